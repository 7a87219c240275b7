"""What alternates, as data: the phases of a training step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import Refused

Batch = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """One move within a training step: these networks lower these losses, all other networks stand still.

    Args:
        name: in logs and messages; empty where there is only one.
        networks: what it trains.
        optimizer: makes the optimizer of their parameters.
        losses: the terms on a batch, by name; their sum is minimised.
        schedule: the optimizer's "lr" (and "momentum", ...) after that many images seen.
        every: it takes part in every how many-th step.
        times: how often it moves in such a step, each time with other noise.
        clip: greatest norm of its gradients, in their own scale; None for no limit.
    """

    name: str
    networks: Sequence[nn.Module]
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    losses: Callable[[Batch], dict[str, Tensor]]
    schedule: Callable[[int], dict[str, float]]
    every: int = 1
    times: int = 1
    clip: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no number of steps."""
        if min(self.every, self.times) < 1:
            raise Refused(f"phase '{self.name}' cannot move {self.times} times every {self.every} steps; both are at least 1")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of its networks."""
        return list(dict.fromkeys(parameter for network in self.networks for parameter in network.parameters()))

    @property
    def prefix(self) -> str:
        """What the names of its figures begin with."""
        return f"{self.name}/" if self.name else ""


@dataclass
class Player:
    """A phase in a running training."""

    phase: Phase
    optimizer: Optimizer

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.phase.parameters if parameter.requires_grad]


@contextmanager
def only(moving: Sequence[Player], players: Sequence[Player]) -> Iterator[None]:
    """Freeze what no moving player trains: no gradient of it is computed, and the moving ones' flow through it."""
    if len(players) == len(moving):
        yield
        return
    try:
        _require(players, False)
        _require(moving, True)
        yield
    finally:
        _require(players, True)


def _require(players: Sequence[Player], gradient: bool) -> None:
    for player in players:
        for parameter in player.parameters:
            parameter.requires_grad = gradient


def chunks_of(batch: Batch, count: int, first: int) -> list[Batch]:
    """A process's share of a batch, cut for accumulation into `count` equal chunks.

    Args:
        batch: tensors of N samples.
        count: divides N.
        first: global position of the first sample.

    Returns:
        Batches that carry "positions" too, the global positions of their samples.
    """
    size = size_of(batch) // count
    return [
        {**{key: value[i * size : (i + 1) * size] for key, value in batch.items()}, "positions": range(begin, begin + size)}
        for i in range(count)
        for begin in [first + i * size]
    ]


def size_of(batch: Batch) -> int:
    """How many samples a batch has."""
    return len(next(iter(batch.values())))
