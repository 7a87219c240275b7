"""Precision of losses under autocast."""

import torch
from torch import Tensor


def to_float32(values: Tensor) -> Tensor:
    """Cast values to float32, or keep float64; bf16 has fewer than three significant digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
