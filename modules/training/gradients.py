"""From a loss to a step of an optimizer: scaling, averaging over processes, clipping, the step itself."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from modules.training.lightning_compat import grad_scaler

BUCKET_BYTES = 25 * 2**20  # bytes that travel together, as torch's DDP does


def backward(trainer: Any, loss: Tensor) -> None:
    """Differentiate a loss, scaled under fp16, outside autocast: it would round the second derivatives of a penalty."""
    scaler = grad_scaler(trainer)
    with torch.autocast(loss.device.type, enabled=False):
        (loss if scaler is None else scaler.scale(loss)).backward()


def optimizer_step(
    trainer: Any, optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_grad_norm: float | None = None
) -> None:
    """Step with the mean of all processes' gradients, each of which travels once.

    Outside autocast, since an optimizer that multiplies matrices must not see it. Under fp16, a step whose gradients have
    overflown is skipped in all processes.

    Args:
        trainer: whose precision and processes these are.
        optimizer: of torch.
        parameters: what it steps.
        max_grad_norm: greatest norm of all gradients together, unscaled.
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
    """Let the scale of fp16 losses grow or shrink, after each step of an optimizer and before the next backward pass."""
    if (scaler := grad_scaler(trainer)) is not None:
        scaler.update()


def average_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Replace each gradient by its mean over all processes; those of divided weights are that already."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for bucket in make_buckets(gradients):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        flat /= world_size
        for gradient, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(mean)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers: batch normalisation has seen other samples in each."""
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)


def make_buckets(tensors: Iterable[Tensor], size: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Tensors in order, cut into lists of one type and at most `size` bytes (or of a single larger tensor)."""
    buckets: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        if not buckets or buckets[-1][0].dtype != tensor.dtype or filled + tensor.nbytes > size:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.nbytes
    return buckets
