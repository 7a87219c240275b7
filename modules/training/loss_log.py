"""Buffer of loss terms between two log entries: they remain on the device, are read together, and must be finite."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.errors import UserError


class NonFiniteLoss(UserError):
    """A loss or a gradient is infinite or NaN; the message names it and the images seen."""


class PhaseLosses(NamedTuple):
    """Loss terms of one optimizer update of a phase."""

    images_seen: int  # images seen after the update
    prefix: str  # prefix of the names in the log
    names: list[str]
    values: Tensor  # (number of names,)


class LossLog:
    """Losses since the last log entry. They are read together, because each read synchronizes the host with the device."""

    def __init__(self) -> None:
        self.pending: list[PhaseLosses] = []

    def append(self, images_seen: int, prefix: str, names: Sequence[str], values: Tensor) -> None:
        """Append the terms of an optimizer update."""
        self.pending.append(PhaseLosses(images_seen, prefix, list(names), values))

    def newest(self, world_size: int, device: torch.device, learning_rate: float) -> dict[str, float]:
        """Return the newest value of each term, by log name.

        Raises:
            NonFiniteLoss: a value is not finite.
        """
        values = iter(self.all_reduce(world_size, device).tolist())
        metrics: dict[str, float] = {}
        for terms in self.pending:
            for name in terms.names:
                value = next(values)
                metrics[f"train/{terms.prefix}{name}"] = value
                if not math.isfinite(value):  # the value is the same on all ranks, so all of them stop
                    raise non_finite(f"loss '{terms.prefix}{name}' is {value}", terms.images_seen, learning_rate)
        return metrics

    def all_reduce(self, world_size: int, device: torch.device) -> Tensor:
        """Average the terms over all ranks and copy them to the host, in one reduction; return all of them in order."""
        if not self.pending:
            return torch.empty(0)
        values = torch.cat([terms.values.to(device) for terms in self.pending])
        if world_size > 1:  # local batches have equal sizes
            dist.all_reduce(values)
            values /= world_size
        values = values.cpu()
        chunks = values.split([len(terms.names) for terms in self.pending])
        self.pending = [terms._replace(values=item) for terms, item in zip(self.pending, chunks, strict=True)]
        return values

    def state(self) -> list[list[Any]]:
        """Return the losses for a checkpoint."""
        return [list(terms) for terms in self.pending]

    def load_state(self, state: list[list[Any]]) -> None:
        """Restore the losses from a checkpoint."""
        self.pending = [PhaseLosses(*terms) for terms in state]


def non_finite(problem: str, images_seen: int, learning_rate: float) -> NonFiniteLoss:
    """Return the error for a loss or a gradient that is not finite."""
    return NonFiniteLoss(f"{problem} after {images_seen} images. Lower model.learning_rate (now {learning_rate})")
