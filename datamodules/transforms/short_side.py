"""Resizing of images to a given shorter side."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_short_side(image: Tensor, length: int) -> Tensor:
    """Resize a uint8 image (C, H, W) by antialiased bilinear interpolation, so that its shorter side has `length` pixels."""
    height, width = image.shape[-2:]
    factor = length / min(height, width)
    size = (max(length, round(height * factor)), max(length, round(width * factor)))
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)
