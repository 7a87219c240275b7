"""Training steps without a Trainer, for `darkroom bench` to compare with and to count."""

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


def loop(method: Method, batches: Iterator[Batch], optimizers: Sequence[Any]) -> Step:
    """A training step as one would write it by hand: each network's optimizer in turn, the other networks frozen."""
    active_phases = [ActivePhase(*pair) for pair in zip(method.phases(), optimizers, strict=True)]
    seen = turn = 0

    def step() -> None:
        nonlocal seen, turn
        batch = next(batches)
        size = batch_size_of(batch)
        turn += 1
        moving = [active for active in active_phases if not turn % active.phase.interval]
        for active in moving:
            for repetition in range(active.phase.n_updates):
                if active is moving[0] or repetition:
                    with train_only([active] if repetition else moving, active_phases):
                        joined = {**batch, "positions": range(seen, seen + size), "repetition": repetition}
                        joined.update(method.shared_forward(joined))
                with train_only([active], active_phases):
                    for group in active.optimizer.param_groups:
                        group.update(active.phase.schedule(seen))
                    active.optimizer.zero_grad()
                    torch.stack(list(active.phase.losses(joined).values())).sum().backward()
                    if active.phase.max_grad_norm is not None:
                        torch.nn.utils.clip_grad_norm_(active.parameters, active.phase.max_grad_norm)
                    active.optimizer.step()
        for part in method.children():
            if isinstance(part, EMA | ImagePool):
                part.update(size)
        seen += size
        method.images_seen = seen

    return step


def optimizers_of(method: Method) -> list[Any]:
    """New ones, of a method that may have but one."""
    found = method.configure_optimizers()
    return found if isinstance(found, list) else [found]


def bare_batches(data: Any, device: torch.device) -> Iterator[Batch]:
    """Our batches, without a Trainer."""
    data = copy(data)  # whose position in the stream is its own
    for batch in data.train_dataloader():
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        yield data.on_after_batch_transfer(moved, 0)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: list[float]) -> list[float]:
    """The lower and the upper one."""
    if len(values) < 2:
        return values * 2
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def flops_of(work: Callable[[], Any]) -> int:
    """Floating-point operations of some work, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
