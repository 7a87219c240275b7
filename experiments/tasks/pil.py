"""Helpers for datasets that load single items with PIL: the common practice, used as the baseline of `darkroom bench`."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a PIL image of mode L or RGB to a float32 tensor (C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).float().div(255)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
