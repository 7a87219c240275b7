"""Optimizers shared by several methods."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def kernels(device: torch.device) -> dict[str, Any]:
    """Return the argument of SGD, Adam or AdamW for their fastest implementation.

    On GPUs, that is the fused one, which does not wait for the scale of fp16. On CPUs, all parameters are updated together,
    with the same values as one by one.
    """
    return {"fused": True} if device.type == "cuda" else {"foreach": True}


def soap(parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
    """Create SOAP without weight decay: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv:2409.11321)."""
    from pytorch_optimizer import SOAP  # imported here: the package is slow to import

    return SOAP(parameters, lr=learning_rate, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=10)
