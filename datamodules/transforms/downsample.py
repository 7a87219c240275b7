"""Masks: one class id a pixel; and how they and their pictures become smaller."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255  # a pixel that does not count


def thinned(mask: np.ndarray, shrink: int) -> np.ndarray:
    """A mask (H, W) a whole number of times smaller: of each block, the value in its middle."""
    height, width = (side // shrink for side in mask.shape)
    return np.ascontiguousarray(mask[shrink // 2 :: shrink, shrink // 2 :: shrink][:height, :width])


def smaller(pixels: Tensor, shrink: int) -> Tensor:
    """uint8 (C, H, W), a whole number of times smaller, antialiased."""
    if shrink == 1:
        return pixels
    size = [side // shrink for side in pixels.shape[-2:]]
    whole = pixels[None, :, : size[0] * shrink, : size[1] * shrink]
    return F.interpolate(whole.float(), size, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
