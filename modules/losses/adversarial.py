"""Adversarial losses on discriminator logits, and the gradient penalty of a critic."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.errors import UserError
from modules.losses.precision import full_precision, to_float32


def bce_real(logits: Tensor) -> Tensor:
    """Compute the cross-entropy with the label "real", the mean of -log D (Goodfellow et al., arXiv:1406.2661, Section 3).

    It is D's loss on reals, and G's non-saturating loss on fakes.

    Args:
        logits: discriminator logits (N, ...); D is their sigmoid.
    """
    return F.softplus(-to_float32(logits)).mean()


def bce_fake(logits: Tensor) -> Tensor:
    """Compute the cross-entropy with the label "fake", the mean of -log(1 - D); its negative is G's saturating loss (eq. 1)."""
    return F.softplus(to_float32(logits)).mean()


def gan_generator_loss(logits: Tensor, kind: str) -> Tensor:
    """Compute the generator loss on fakes: "non-saturating", max log D(G(z)), or "saturating", min log(1 - D(G(z))) (eq. 1).

    If D rejects a fake with confidence, log(1 - D) is flat and -log D is steep (Goodfellow et al., Section 3).

    Raises:
        UserError: `kind` has another value.
    """
    if kind == "non-saturating":
        return bce_real(logits)
    if kind == "saturating":
        return -bce_fake(logits)
    raise UserError(f"model.loss: {kind} is not valid. Use non-saturating or saturating")


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor, target: float = 1.0
) -> Tensor:
    """Compute the gradient penalty (Gulrajani et al., arXiv:1704.00028, eq. 3, without lambda).

    It is the mean of (|grad| / target - 1)**2; in ProGAN's setting for CIFAR-10, `target` is 750 (Karras et al., Appendix).

    The computation is outside autocast and TF32: bf16 causes relative errors of several percent in the second derivatives.
    With `--tf32 true`, the backward pass through the penalty is in TF32, as that of all losses.

    Args:
        critic: function from images to values; it must not be compiled.
        real, fake: images (N, C, H, W).
        alpha: interpolation weights of `real`, (N, 1) in (0, 1).
        target: norm of the gradient without penalty.
    """
    with full_precision():
        weight_real = alpha.to(real.dtype).view(-1, *[1] * (real.ndim - 1))
        interpolated = torch.lerp(fake.detach().to(real.dtype), real, weight_real).requires_grad_()
        (grad,) = torch.autograd.grad(critic(interpolated).sum(), interpolated, create_graph=True)
        return (grad.flatten(1).norm(dim=1) / target - 1).square().mean()
