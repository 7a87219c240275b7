"""Training steps without a Trainer, as a baseline for `darkroom bench` and for counting operations."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modules.training.ema import EMA
from modules.training.image_pool import ImagePool
from modules.training.method import Method
from modules.training.phases import ActivePhase, Batch, batch_size_of, train_only

Step = Callable[[], None]


def make_reference_step(method: Method, batches: Iterator[Batch], optimizers: Sequence[Any]) -> Step:
    """Return a handwritten training step: update each network in turn, with the other networks frozen."""
    active_phases = [ActivePhase(*pair) for pair in zip(method.phases(), optimizers, strict=True)]
    images_seen = step_index = 0

    def step() -> None:
        nonlocal images_seen, step_index
        batch = next(batches)
        size = batch_size_of(batch)
        step_index += 1
        due = [active for active in active_phases if not step_index % active.phase.interval]
        for active in due:
            for repeat_index in range(active.phase.n_updates):
                if active is due[0] or repeat_index:
                    with train_only([active] if repeat_index else due, active_phases):
                        inputs = {
                            **batch,
                            "sample_ids": range(images_seen, images_seen + size),
                            "repeat_index": repeat_index,
                        }
                        inputs.update(method.shared_forward(inputs))
                with train_only([active], active_phases):
                    for group in active.optimizer.param_groups:
                        group.update(active.phase.schedule(images_seen))
                    active.optimizer.zero_grad()
                    torch.stack(list(active.phase.losses(inputs).values())).sum().backward()
                    if active.phase.max_grad_norm is not None:
                        torch.nn.utils.clip_grad_norm_(active.parameters, active.phase.max_grad_norm)
                    active.optimizer.step()
        for child in method.children():
            if isinstance(child, EMA | ImagePool):
                child.update(size)
        images_seen += size
        method.images_seen = images_seen

    return step


def make_optimizers(method: Method) -> list[Any]:
    """Create new optimizers for a method, as a list even if there is only one."""
    optimizers = method.configure_optimizers()
    return optimizers if isinstance(optimizers, list) else [optimizers]


def bare_batches(data: Any, device: torch.device) -> Iterator[Batch]:
    """Yield training batches of a data module on a device, without a Trainer."""
    data = copy(data)  # keeps its own position in the stream
    for batch in data.train_dataloader():
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        yield data.on_after_batch_transfer(moved, 0)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: list[float]) -> list[float]:
    """Return the lower and the upper quartile; a single value is both."""
    if len(values) < 2:
        return values * 2
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def count_flops(function: Callable[[], Any]) -> int:
    """Return the floating-point operations of a call, counted by torch's `FlopCounterMode`."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
