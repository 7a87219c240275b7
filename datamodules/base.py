"""What datamodules share whose training data is an endless stream: where it stands, each process's share of it, resume."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from datamodules.errors import Refused
from datamodules.io.image_refs import Survey
from datamodules.io.loader import load
from datamodules.sampler import EndlessBatches, Slice


class Stream(L.LightningDataModule):
    """The base of a datamodule whose stream of shuffled batches is a function of a seed and of the samples taken so far.

    Args:
        batch_size: global batch, over all devices.
        workers: loader processes of training; 0 is fastest where the data is kept in memory.
        seed: of the order, and of all that is drawn for a sample.
        skip_bad: leave unusable files out (and say how many) instead of refusing to start.
    """

    test: Sequence[str] = ()

    def __init__(self, batch_size: int, workers: int = 0, seed: int = 0, skip_bad: bool = False) -> None:
        super().__init__()
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.position = 0  # samples taken so far, by all processes together
        self.survey = Survey(skip_bad)
        self.absent: list[str] = []

    @property
    def place(self) -> tuple[int, int]:
        """Which process this is, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def endless(self, items: Dataset[Any], length: int) -> DataLoader[Any]:
        """Batches of training items, without end: this process's share of each.

        Raises:
            Refused: a batch cannot be shared equally.
        """
        rank, world = self.place
        if self.batch_size % world:
            raise Refused(
                f"data.batch_size: {self.batch_size} cannot be shared by {world} processes; take a multiple of {world}"
            )
        sampler = EndlessBatches(length, self.batch_size, self.seed, lambda: self.position, rank, world)
        return load(items, sampler, self.workers)

    def dealt(self, items: Dataset[Any], length: int) -> DataLoader[Any]:
        """Items to measure on, each once: those of this process."""
        return load(items, Slice(length, *self.place))

    def state_dict(self) -> dict[str, int]:
        """Where the stream of samples stands."""
        return {"position": self.position, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there.

        Raises:
            Refused: another batch size or seed than the checkpoint's: the run would not be the same run.
        """
        for key in ("batch_size", "seed"):
            if state[key] != getattr(self, key):
                raise Refused(f"data.{key}: {getattr(self, key)}, but the checkpoint's run had {state[key]}")
        self.position = state["position"]
