"""Precision of losses under autocast."""

import torch
from torch import Tensor


def to_float32(logits: Tensor) -> Tensor:
    """Cast logits to float32, or keep float64; bf16 has fewer than three significant digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
