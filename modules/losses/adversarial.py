"""Losses of adversarial methods, from a discriminator's logits, and the penalty on a critic's slope."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.errors import UserError
from modules.losses.precision import to_float32


def bce_real(logits: Tensor) -> Tensor:
    """Cross-entropy of calling the samples real, mean of -log D: what D pays for reals and, non-saturating, G for fakes.

    Goodfellow et al., arXiv:1406.2661, Section 3.

    Args:
        logits: (N, ...), of which D is the sigmoid.
    """
    return F.softplus(-to_float32(logits)).mean()


def bce_fake(logits: Tensor) -> Tensor:
    """Cross-entropy of calling the samples fake, mean of -log(1 - D); with its sign turned, G's saturating loss (eq. 1)."""
    return F.softplus(to_float32(logits)).mean()


def gan_generator_loss(logits: Tensor, loss: str) -> Tensor:
    """The generator's loss on fakes: "non-saturating", max log D(G(z)), or "saturating", min log(1 - D(G(z))) (eq. 1).

    Goodfellow et al., Section 3: log(1 - D) is flat where D is sure of a fake, -log D is steep there.

    Raises:
        Refused: it is called otherwise.
    """
    if loss == "non-saturating":
        return bce_real(logits)
    if loss == "saturating":
        return -bce_fake(logits)
    raise UserError(f"model.loss: {loss}; take non-saturating or saturating")


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """Mean of (|slope| - 1)**2 between reals and fakes: Gulrajani et al., arXiv:1704.00028, eq. 3, without its weight.

    In full precision, whatever autocast says: rounding to bf16 puts percents of error into the second derivatives.

    Args:
        critic: images to values; torch cannot compile it.
        real, fake: (N, C, H, W).
        alpha: (N, 1) in (0, 1), each pair's place between the two.
    """
    with torch.autocast(real.device.type, enabled=False):
        weight_real = alpha.to(real.dtype).view(-1, *[1] * (real.ndim - 1))
        interpolated = torch.lerp(fake.detach().to(real.dtype), real, weight_real).requires_grad_()
        (grad,) = torch.autograd.grad(critic(interpolated).sum(), interpolated, create_graph=True)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()
