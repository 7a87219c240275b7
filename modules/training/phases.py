"""Phases of a training step: the optimizer updates of alternating networks, as data."""

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
    """One part of a training step: optimizer updates of `networks` on `losses`; all other networks are frozen.

    Args:
        name: name in logs and messages; empty for a method with a single phase.
        networks: networks to train.
        optimizer: function from their parameters to an optimizer.
        losses: function from a batch to the loss terms by name; their sum is minimised.
        schedule: function from the images seen to the optimizer's "lr" (and "momentum", ...).
        interval: number of training steps from one use of the phase to the next.
        n_updates: optimizer updates in such a step, each with new noise.
        max_grad_norm: maximum norm of the unscaled gradients; None for no clipping.

    Raises:
        UserError: `interval` or `n_updates` is less than 1.
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
        if min(self.interval, self.n_updates) < 1:
            raise UserError(f"phase '{self.name}': n_updates {self.n_updates} and interval {self.interval} must be at least 1")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the networks, without duplicates."""
        return list(dict.fromkeys(parameter for network in self.networks for parameter in network.parameters()))

    @property
    def prefix(self) -> str:
        """Prefix of the names of its logged losses."""
        return f"{self.name}/" if self.name else ""


@dataclass
class ActivePhase:
    """A phase with its optimizer and trainable parameters during training."""

    phase: Phase
    optimizer: Optimizer

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.phase.parameters if parameter.requires_grad]


@contextmanager
def train_only(trained: Sequence[ActivePhase], active_phases: Sequence[ActivePhase]) -> Iterator[None]:
    """Freeze the parameters of all phases except `trained`; gradients still flow through frozen networks."""
    if len(active_phases) == len(trained):
        yield
        return
    try:
        _set_requires_grad(active_phases, False)
        _set_requires_grad(trained, True)
        yield
    finally:
        _set_requires_grad(active_phases, True)


def _set_requires_grad(active_phases: Sequence[ActivePhase], enabled: bool) -> None:
    for active in active_phases:
        for parameter in active.parameters:
            parameter.requires_grad = enabled


def split_micro_batches(batch: Batch, count: int, first_id: int) -> list[Batch]:
    """Split the local batch of a rank into equal micro-batches for gradient accumulation.

    Args:
        batch: tensors of N samples.
        count: number of micro-batches; must divide N.
        first_id: id of the first sample, the number of samples before it in the run.

    Returns:
        The micro-batches, each with the ids of its samples as "sample_ids", a range.
    """
    size = batch_size_of(batch) // count
    return [
        {**{key: value[i * size : (i + 1) * size] for key, value in batch.items()}, "sample_ids": range(start, start + size)}
        for i in range(count)
        for start in [first_id + i * size]
    ]


def batch_size_of(batch: Batch) -> int:
    """Number of samples in a batch."""
    return len(next(iter(batch.values())))
