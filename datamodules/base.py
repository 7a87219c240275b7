"""Base class of datamodules: an infinite, resumable stream of training batches, sharded over ranks."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from datamodules.errors import UserError
from datamodules.io.image_refs import DataReport
from datamodules.io.loader import make_loader
from datamodules.sampler import InfiniteBatchSampler, RankSampler


class ResumableDataModule(L.LightningDataModule):
    """Base class of datamodules whose training stream is a function of a seed and of the number of samples taken.

    Args:
        batch_size: global batch size, over all devices.
        num_workers: loader processes for training; 0 is fastest for data in memory.
        seed: seed of the order and of all random numbers of a sample.
        skip_bad: skip unusable files and report their count instead of raising an error.
    """

    test: Sequence[str] = ()

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0, skip_bad: bool = False) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.samples_seen = 0  # over all ranks
        self.data_report = DataReport(skip_bad)
        self.missing_sets: list[str] = []

    @property
    def rank_and_world_size(self) -> tuple[int, int]:
        """Global rank and number of processes; (0, 1) without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_loader(self, items: Dataset[Any], length: int) -> DataLoader[Any]:
        """Infinite loader of this rank's part of every training batch.

        Raises:
            UserError: the batch size is not a multiple of the number of processes.
        """
        rank, world_size = self.rank_and_world_size
        if self.batch_size % world_size:
            raise UserError(
                f"data.batch_size: {self.batch_size} is not divisible by {world_size} processes; use a multiple of {world_size}"
            )
        sampler = InfiniteBatchSampler(length, self.batch_size, self.seed, lambda: self.samples_seen, rank, world_size)
        return make_loader(items, sampler, self.num_workers)

    def eval_loader(self, items: Dataset[Any], length: int) -> DataLoader[Any]:
        """Loader of this rank's evaluation items, each once."""
        return make_loader(items, RankSampler(length, *self.rank_and_world_size))

    def state_dict(self) -> dict[str, int]:
        """Position of the sample stream, and the settings that determine its order."""
        return {"position": self.samples_seen, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume the stream at the position of a checkpoint.

        Raises:
            UserError: the batch size or seed differs from the checkpoint's.
        """
        for key in ("batch_size", "seed"):
            if state[key] != getattr(self, key):
                raise UserError(f"data.{key}: {getattr(self, key)}, but the checkpoint's run had {state[key]}")
        self.samples_seen = state["position"]
