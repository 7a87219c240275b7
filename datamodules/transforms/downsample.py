"""Masks: one class id a pixel; and how they and their pictures become smaller."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255  # a pixel that does not count


def downsample_mask(mask: np.ndarray, downscale: int) -> np.ndarray:
    """A mask (H, W) a whole number of times smaller: of each block, the value in its middle."""
    height, width = (side // downscale for side in mask.shape)
    return np.ascontiguousarray(mask[downscale // 2 :: downscale, downscale // 2 :: downscale][:height, :width])


def downsample_image(pixels: Tensor, downscale: int) -> Tensor:
    """uint8 (C, H, W), a whole number of times smaller, antialiased."""
    if downscale == 1:
        return pixels
    size = [side // downscale for side in pixels.shape[-2:]]
    whole = pixels[None, :, : size[0] * downscale, : size[1] * downscale]
    return F.interpolate(whole.float(), size, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
