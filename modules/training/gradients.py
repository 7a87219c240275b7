"""Backward pass and optimizer step: loss scaling, averaging over ranks, clipping, and the check of gradients."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from modules.training.fsdp import gather_full_tensors
from modules.training.lightning_compat import grad_scaler
from modules.training.phases import BoundPhase

MIN_LOSS_SCALE = 2.0**-14  # smallest fp16 loss scale; torch starts at 2**16 and halves it at each overflow
BUCKET_BYTES = 25 * 2**20  # bytes per all-reduce, the default of torch's DDP


def backward(trainer: Any, loss: Tensor) -> None:
    """Backpropagate a loss, scaled under fp16.

    The backward pass is outside autocast, which would round the second derivatives of a gradient penalty.
    """
    scaler = grad_scaler(trainer)
    with torch.autocast(loss.device.type, enabled=False):
        (loss if scaler is None else scaler.scale(loss)).backward()


def optimizer_step(
    trainer: Any, optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_grad_norm: float | None = None
) -> None:
    """Average each gradient over all ranks, and update the parameters.

    The step is outside autocast, which would round the matrix products of an optimizer. Under fp16, all ranks skip a step whose
    gradients overflow.

    Args:
        trainer: Lightning trainer, for the precision and the number of ranks.
        optimizer: torch optimizer.
        parameters: parameters of the optimizer.
        max_grad_norm: maximum norm of all gradients together, without the loss scale; None for no clipping.
    """
    scaler = grad_scaler(trainer)
    with torch.autocast(parameters[0].device.type, enabled=False):
        if trainer.world_size > 1:
            average_gradients(parameters, trainer.world_size)
        if max_grad_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
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


def average_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Replace each gradient by its mean over all ranks; FSDP has already averaged those of sharded weights."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for bucket in make_buckets(gradients):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        flat /= world_size
        for gradient, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(mean)


def broadcast_buffers(module: nn.Module) -> None:
    """Broadcast the buffers of rank 0: the statistics of batch normalization differ between ranks."""
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)


def make_buckets(tensors: Iterable[Tensor], size: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Split tensors, in order, into lists of one dtype and at most `size` bytes (or a single larger tensor)."""
    buckets: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        if not buckets or buckets[-1][0].dtype != tensor.dtype or filled + tensor.nbytes > size:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.nbytes
    return buckets
