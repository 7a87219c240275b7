"""What alternates, as data: the phases of a training step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import UserError

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
        interval: it takes part in every how many-th step.
        n_updates: how often it moves in such a step, each time with other noise.
        max_grad_norm: greatest norm of its gradients, in their own scale; None for no limit.
    """

    name: str
    networks: Sequence[nn.Module]
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    losses: Callable[[Batch], dict[str, Tensor]]
    schedule: Callable[[int], dict[str, float]]
    interval: int = 1
    n_updates: int = 1
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no number of steps."""
        if min(self.interval, self.n_updates) < 1:
            raise UserError(
                f"phase '{self.name}' cannot move {self.n_updates} times every {self.interval} steps; both are at least 1"
            )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of its networks."""
        return list(dict.fromkeys(parameter for network in self.networks for parameter in network.parameters()))

    @property
    def prefix(self) -> str:
        """What the names of its figures begin with."""
        return f"{self.name}/" if self.name else ""


@dataclass
class ActivePhase:
    """A phase in a running training."""

    phase: Phase
    optimizer: Optimizer

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.phase.parameters if parameter.requires_grad]


@contextmanager
def train_only(moving: Sequence[ActivePhase], active_phases: Sequence[ActivePhase]) -> Iterator[None]:
    """Freeze what no moving player trains: no gradient of it is computed, and the moving ones' flow through it."""
    if len(active_phases) == len(moving):
        yield
        return
    try:
        _set_requires_grad(active_phases, False)
        _set_requires_grad(moving, True)
        yield
    finally:
        _set_requires_grad(active_phases, True)


def _set_requires_grad(active_phases: Sequence[ActivePhase], gradient: bool) -> None:
    for active in active_phases:
        for parameter in active.parameters:
            parameter.requires_grad = gradient


def split_micro_batches(batch: Batch, count: int, first: int) -> list[Batch]:
    """A process's share of a batch, cut for accumulation into `count` equal chunks.

    Args:
        batch: tensors of N samples.
        count: divides N.
        first: global position of the first sample.

    Returns:
        Batches that carry "positions" too, the global positions of their samples.
    """
    size = batch_size_of(batch) // count
    return [
        {**{key: value[i * size : (i + 1) * size] for key, value in batch.items()}, "positions": range(begin, begin + size)}
        for i in range(count)
        for begin in [first + i * size]
    ]


def batch_size_of(batch: Batch) -> int:
    """How many samples a batch has."""
    return len(next(iter(batch.values())))
