"""Phases of a training step: declarations of the optimizer updates of alternating networks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import UserError
from modules.training.averaging import GradientAverager

Batch = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """One part of a training step: updates of one optimizer on `losses`; the parameters of other optimizers are frozen.

    Args:
        name: name in logs and messages; empty for a method with a single phase.
        losses: function from a batch to the loss terms by name; their sum is minimized.
        schedule: function from the images seen to the optimizer's "lr" (and "momentum", ...); None for the learning rate of
            `Method.schedule`.
        optimizer: name of the optimizer, see `Method.make_optimizers`; None for the name of the phase. Two phases may share an
            optimizer, such as a loss and its lazy regularization.
        every_n_steps: the phase runs in every n-th training step.
        n_updates: optimizer updates in such a step, each with new noise.
        max_grad_norm: maximum norm of the unscaled gradients; None for no clipping.

    Raises:
        UserError: `every_n_steps` or `n_updates` is less than 1.
    """

    name: str
    losses: Callable[[Batch], dict[str, Tensor]]
    schedule: Callable[[int], dict[str, float]] | None = None
    optimizer: str | None = None
    every_n_steps: int = 1
    n_updates: int = 1
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if min(self.every_n_steps, self.n_updates) < 1:
            raise UserError(
                f"phase '{self.name}': n_updates {self.n_updates}, every_n_steps {self.every_n_steps}. Use at least 1 for both"
            )

    @property
    def prefix(self) -> str:
        """Prefix of the names of its logged losses."""
        return f"{self.name}/" if self.name else ""


def expect_dict(value: Any, phase: Phase, function: str, content: str) -> dict[str, Any]:
    """Return the result of a function of a phase, which must be a dict.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, dict):
        found = type(value).__name__
        raise TypeError(f"phase '{phase.name}': `{function}` returned {found}. Return a dict of {content} by name")
    return value


@dataclass
class BoundPhase:
    """A phase with its optimizer, that optimizer's trainable parameters, and the average of their gradients over all ranks."""

    phase: Phase
    optimizer: Optimizer
    averager: GradientAverager | None = None  # shared by the phases of an optimizer; None for a single rank

    def __post_init__(self) -> None:
        self.parameters: list[nn.Parameter] = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"] if parameter.requires_grad
        ]


def bind_phases(phases: Sequence[Phase], optimizers: Mapping[str, Optimizer]) -> list[BoundPhase]:
    """Pair each phase with its optimizer.

    Args:
        phases: phases in order.
        optimizers: optimizers by name.

    Raises:
        TypeError: two phases have the same name, or the phases do not use exactly the given optimizers.
    """
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise TypeError(f"two phases have the same name: {', '.join(names)}")
    used = [phase.name if phase.optimizer is None else phase.optimizer for phase in phases]
    if set(used) != set(optimizers):
        raise TypeError(f"the phases use the optimizers {sorted(set(used))}, but the method has {sorted(optimizers)}")
    return [BoundPhase(phase, optimizers[name]) for phase, name in zip(phases, used, strict=True)]


def add_averagers(phases: Sequence[BoundPhase], trainer: Any) -> None:
    """Average the gradients of each optimizer over the ranks of a Lightning trainer, if there are several."""
    if trainer.world_size == 1:
        return
    averagers: dict[Optimizer, GradientAverager] = {}
    for bound in phases:
        if bound.optimizer not in averagers:
            averagers[bound.optimizer] = GradientAverager(bound.parameters, trainer.world_size, trainer.strategy.exchange_dtype)
        bound.averager = averagers[bound.optimizer]


@contextmanager
def train_only(trained: Sequence[BoundPhase], phases: Sequence[BoundPhase]) -> Iterator[None]:
    """Freeze the parameters of all phases except `trained`; gradients still flow through frozen networks."""
    if len(phases) == len(trained):
        yield
        return
    try:
        _set_requires_grad(phases, False)
        _set_requires_grad(trained, True)
        yield
    finally:
        _set_requires_grad(phases, True)


def _set_requires_grad(phases: Sequence[BoundPhase], enabled: bool) -> None:
    for phase in phases:
        for parameter in phase.parameters:
            parameter.requires_grad = enabled


def split_micro_batches(batch: Batch, count: int, first_id: int) -> list[Batch]:
    """Split the local batch of a rank into equal micro-batches for gradient accumulation.

    Args:
        batch: tensors or lists of N samples.
        count: number of micro-batches; must divide N.
        first_id: id of the first sample, the number of samples before it in the run.

    Returns:
        The micro-batches, each with the ids of its samples as "sample_ids", a range.
    """
    if count == 1:
        return [{**batch, "sample_ids": range(first_id, first_id + batch_size_of(batch))}]
    size = batch_size_of(batch) // count
    return [
        {**{key: value[i * size : (i + 1) * size] for key, value in batch.items()}, "sample_ids": range(start, start + size)}
        for i in range(count)
        for start in [first_id + i * size]
    ]


def batch_size_of(batch: Batch) -> int:
    """Return the number of samples in a batch."""
    return len(next(iter(batch.values())))


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors in nested lists and dicts; other values do not change."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return [map_tensors(item, function) for item in value] if isinstance(value, list) else value


def detach_tensors(batch: Batch) -> Batch:
    """Detach the tensors of a batch."""
    return {key: map_tensors(value, Tensor.detach) for key, value in batch.items()}


def has_gradients(value: Any) -> bool:
    """Return whether a tensor in nested lists and dicts requires gradients."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(map(has_gradients, value.values()))
    return any(map(has_gradients, value)) if isinstance(value, list) else False
