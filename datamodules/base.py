"""What datamodules share whose training data is an endless stream: where it stands, each process's share of it, resume."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from datamodules.errors import UserError
from datamodules.io.image_refs import DataReport
from datamodules.io.loader import make_loader
from datamodules.sampler import InfiniteBatchSampler, RankSampler


class ResumableDataModule(L.LightningDataModule):
    """The base of a datamodule whose stream of shuffled batches is a function of a seed and of the samples taken so far.

    Args:
        batch_size: global batch, over all devices.
        num_workers: loader processes of training; 0 is fastest where the data is kept in memory.
        seed: of the order, and of all that is drawn for a sample.
        skip_bad: leave unusable files out (and say how many) instead of refusing to start.
    """

    test: Sequence[str] = ()

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0, skip_bad: bool = False) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.samples_seen = 0  # samples taken so far, by all processes together
        self.data_report = DataReport(skip_bad)
        self.missing_sets: list[str] = []

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """Which process this is, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_loader(self, items: Dataset[Any], length: int) -> DataLoader[Any]:
        """Batches of training items, without end: this process's share of each.

        Raises:
            Refused: a batch cannot be shared equally.
        """
        rank, world = self.rank_and_world
        if self.batch_size % world:
            raise UserError(
                f"data.batch_size: {self.batch_size} cannot be shared by {world} processes; take a multiple of {world}"
            )
        sampler = InfiniteBatchSampler(length, self.batch_size, self.seed, lambda: self.samples_seen, rank, world)
        return make_loader(items, sampler, self.num_workers)

    def eval_loader(self, items: Dataset[Any], length: int) -> DataLoader[Any]:
        """Items to measure on, each once: those of this process."""
        return make_loader(items, RankSampler(length, *self.rank_and_world))

    def state_dict(self) -> dict[str, int]:
        """Where the stream of samples stands."""
        return {"position": self.samples_seen, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there.

        Raises:
            Refused: another batch size or seed than the checkpoint's: the run would not be the same run.
        """
        for key in ("batch_size", "seed"):
            if state[key] != getattr(self, key):
                raise UserError(f"data.{key}: {getattr(self, key)}, but the checkpoint's run had {state[key]}")
        self.samples_seen = state["position"]
