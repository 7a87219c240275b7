"""Optimizers shared by several methods."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer


def soap(parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
    """Create SOAP without weight decay: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv:2409.11321)."""
    from pytorch_optimizer import SOAP  # imported here: the package is slow to import

    return SOAP(parameters, lr=learning_rate, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=10)
