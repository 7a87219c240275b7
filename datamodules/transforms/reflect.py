"""Reflection at image borders."""

import torch
from torch import Tensor


def reflect_index(index: Tensor, length: Tensor) -> Tensor:
    """Map integer positions of any size into [0, length) by reflection at the centers of the first and last pixel.

    Args:
        index: positions, int64.
        length: number of pixels along the axis, broadcast against `index`.

    Returns:
        int64, shaped as `index`.
    """
    period = (2 * length - 2).clamp(min=1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)
