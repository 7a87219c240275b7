"""From a loss to a step of an optimizer: scaling, averaging over processes, the step itself."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Optimizer

from modules.lightning_adapter import grad_scaler

BUCKET = 25 * 2**20  # bytes that travel together, as torch's DDP does


def step(trainer: Any, optimizer: Optimizer, loss: Tensor) -> None:
    """Differentiate a loss and step, outside autocast: an optimizer that multiplies matrices must not see it.

    Every process steps with the mean of all processes' gradients; each gradient travels once.

    Args:
        trainer: whose precision and processes these are.
        optimizer: of torch.
        loss: this process's share, a mean over its samples.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = grad_scaler(trainer)
    optimizer.zero_grad()
    with torch.autocast(loss.device.type, enabled=False):
        (loss if scaler is None else scaler.scale(loss)).backward()
        if trainer.world_size > 1:
            average_gradients(parameters, trainer.world_size)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


def average_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Replace each gradient by its mean over all processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in buckets(gradients):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        flat /= world_size
        for gradient, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(mean)


def buckets(tensors: Iterable[Tensor], size: int = BUCKET) -> list[list[Tensor]]:
    """Tensors in order, cut into lists of one type and at most `size` bytes (or of a single larger tensor)."""
    found: list[list[Tensor]] = []
    full = 0
    for tensor in tensors:
        if not found or found[-1][0].dtype != tensor.dtype or full + tensor.nbytes > size:
            found.append([])
            full = 0
        found[-1].append(tensor)
        full += tensor.nbytes
    return found
