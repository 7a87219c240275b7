"""Downsampling of masks and images by integer factors."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255  # mask value of pixels excluded from loss and metrics


def downsample_mask(mask: np.ndarray, downscale: int) -> np.ndarray:
    """Reduce a mask (H, W) by an integer factor to the center value of each block."""
    height, width = (side // downscale for side in mask.shape)
    return np.ascontiguousarray(mask[downscale // 2 :: downscale, downscale // 2 :: downscale][:height, :width])


def downsample_image(pixels: Tensor, downscale: int) -> Tensor:
    """Reduce a uint8 or float32 image (C, H, W) by an integer factor with antialiased bilinear interpolation."""
    if downscale == 1:
        return pixels
    size = [side // downscale for side in pixels.shape[-2:]]
    cropped = pixels[None, :, : size[0] * downscale, : size[1] * downscale]
    reduced = F.interpolate(cropped.float(), size, mode="bilinear", antialias=True)[0]
    return reduced.round().to(torch.uint8) if pixels.dtype == torch.uint8 else reduced
