"""Training steps without a Trainer, for `darkroom bench` to compare with and to count."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modules.training.ema import Average
from modules.training.image_pool import Pool
from modules.training.method import Method
from modules.training.phases import Batch, Player, only, size_of

Step = Callable[[], None]


def loop(method: Method, batches: Iterator[Batch], optimizers: Sequence[Any]) -> Step:
    """A training step as one would write it by hand: each network's optimizer in turn, the other networks frozen."""
    players = [Player(*pair) for pair in zip(method.phases(), optimizers, strict=True)]
    seen = turn = 0

    def step() -> None:
        nonlocal seen, turn
        batch = next(batches)
        size = size_of(batch)
        turn += 1
        moving = [player for player in players if not turn % player.phase.every]
        for player in moving:
            for repetition in range(player.phase.times):
                if player is moving[0] or repetition:
                    with only([player] if repetition else moving, players):
                        joined = {**batch, "positions": range(seen, seen + size), "repetition": repetition}
                        joined.update(method.shared(joined))
                with only([player], players):
                    for group in player.optimizer.param_groups:
                        group.update(player.phase.schedule(seen))
                    player.optimizer.zero_grad()
                    torch.stack(list(player.phase.losses(joined).values())).sum().backward()
                    if player.phase.clip is not None:
                        torch.nn.utils.clip_grad_norm_(player.parameters, player.phase.clip)
                    player.optimizer.step()
        for part in method.children():
            if isinstance(part, Average | Pool):
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
