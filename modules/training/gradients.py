"""Backward pass and optimizer step: loss scaling, averaging over ranks, clipping, and the check of gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modules.training.averaging import GradientAverager
from modules.training.fsdp import gather_full_tensors
from modules.training.image_pool import ImagePool
from modules.training.lightning_compat import grad_scaler
from modules.training.phases import BoundPhase

MIN_LOSS_SCALE = 2.0**-14  # smallest fp16 loss scale; torch starts at 2**16 and halves it at each overflow


def backward(trainer: Any, loss: Tensor, averager: GradientAverager | None = None) -> None:
    """Backpropagate a loss, scaled under fp16.

    The backward pass is outside autocast, which would round the second derivatives of a gradient penalty.

    Args:
        trainer: Lightning trainer, for the precision.
        loss: scalar.
        averager: average over all ranks of the gradients that this backward pass completes; None if another one follows before
            the optimizer step, or for a single rank.
    """
    if averager is not None:
        averager.prepare()
    scaler = grad_scaler(trainer)
    with torch.autocast(loss.device.type, enabled=False):
        (loss if scaler is None else scaler.scale(loss)).backward()


def optimizer_step(trainer: Any, bound: BoundPhase) -> None:
    """Average each gradient over all ranks, clip them, and update the parameters.

    The step is outside autocast, which would round the matrix products of an optimizer. Under fp16, all ranks skip a step whose
    gradients overflow.

    Args:
        trainer: Lightning trainer, for the precision.
        bound: phase; its maximum norm is that of all gradients together, without the loss scale.
    """
    scaler, optimizer = grad_scaler(trainer), bound.optimizer
    with torch.autocast(bound.parameters[0].device.type, enabled=False):
        if bound.averager is not None:
            bound.averager.finish()
        if bound.phase.max_grad_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(bound.parameters, bound.phase.max_grad_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)


def update_grad_scaler(trainer: Any) -> None:
    """Update the fp16 loss scale; call it after each optimizer step, before the next backward pass."""
    if (scaler := grad_scaler(trainer)) is not None:
        scaler.update()


def gradient_problem(trainer: Any, bound: BoundPhase) -> str:
    """Return why the gradients of a phase cannot be used; empty if they are finite.

    Under fp16, the loss scale is checked instead, because the scaler skips steps that overflow.
    """
    suffix = f" of '{bound.phase.name}'" if bound.phase.name else ""
    if (scaler := grad_scaler(trainer)) is not None:
        return f"the gradient{suffix} overflows in fp16 at any scale" if scaler.get_scale() < MIN_LOSS_SCALE else ""
    gradients = [parameter.grad for parameter in bound.parameters if parameter.grad is not None]
    norm = gather_full_tensors(nn.utils.get_total_norm(gradients))
    return "" if norm.isfinite() else f"the gradient's norm{suffix} is {norm.item()}"


def broadcast_buffers(module: nn.Module) -> None:
    """Broadcast the buffers of rank 0: the statistics of batch normalization differ between ranks; image pools do not."""
    for submodule in module.modules():
        if not isinstance(submodule, ImagePool):
            for buffer in submodule.buffers(recurse=False):
                dist.broadcast(buffer, src=0)
