"""Precision of losses and of metrics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.backends import cudnn


def to_float32(logits: Tensor) -> Tensor:
    """Cast logits to float32, or keep float64; bf16 has fewer than three significant digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute without autocast on any device, and without TF32.

    TF32 has ten bits of precision and is torch's default in convolutions.
    """
    settings = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    matmul, allowed = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    with (
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        cudnn.flags(**settings, allow_tf32=False),
    ):
        matmul.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32 = allowed
