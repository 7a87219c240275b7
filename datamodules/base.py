"""Base class of datamodules: an infinite, resumable stream of training batches, sharded over ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.catalog.catalog import DatasetNotFound, catalog, resolve_images
from datamodules.errors import UserError
from datamodules.io.copy_ahead import copies_ahead
from datamodules.io.device_store import DeferredItems, Storable, fits
from datamodules.io.image_refs import DataReport, dataset_label
from datamodules.io.loader import make_loader
from datamodules.sampler import GroupedBatchSampler, InfiniteBatchSampler, RankSampler

TestData = TypeVar("TestData")


def full_size(position: int) -> None:
    """Return None, the full size of images; a default of `ResumableDataModule.image_size_at` that can be pickled."""


class ResumableDataModule(L.LightningDataModule, ABC):
    """Base class of datamodules whose training stream is a function of a seed and of the number of samples taken.

    Attributes:
        position: function that returns the number of samples taken so far by all ranks; set by the method before training.
        batch_size_at: function that maps a position to the global batch size at this position; set by the method as well.
        image_size_at: function that maps a position to the side of the images, None for their full size; set by the method as
            well. Only `Generation` supports other sizes.
        data_report: validation results and content hashes of the images.
        missing_sets: test sets that are not installed, with a message about each.

    Args:
        batch_size: global batch size, over all devices; a stage of a method may use another size.
        num_workers: loader processes for training; 0 is fastest for data in memory, which then lie on the GPU if they take at
            most a fifth of its memory.
        seed: seed of the order and of all random numbers of a sample.
        skip_bad: skip unusable files and report their count instead of raising an error.
    """

    test: Sequence[str] = ()

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0, skip_bad: bool = False) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.position: Callable[[], int] = lambda: 0
        self.batch_size_at: Callable[[int], int] = lambda position: self.batch_size
        self.image_size_at: Callable[[int], int | None] = full_size
        self.data_report = DataReport(skip_bad)
        self.missing_sets: dict[str, str] = {}
        self.deferred: DeferredItems | None = None  # training data on the GPU

    @property
    def rank_and_world_size(self) -> tuple[int, int]:
        """Global rank and number of processes; (0, 1) without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def read_test_sets(self, read: Callable[[str], TestData]) -> list[TestData]:
        """Read the test sets that are installed; the others are added to `missing_sets`.

        Args:
            read: function that reads a dataset by its name or folder.

        Raises:
            UserError: two test sets have the same name in logs and records.
            DatasetNotFound: no test set is installed.
        """
        names = [dataset_label(spec) for spec in self.test]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"data.test: two datasets have the name {duplicates[0]}. Rename one of the folders")
        found = []
        for spec in self.test:
            try:
                found.append(read(spec))
            except DatasetNotFound as error:
                self.missing_sets[spec] = str(error)
        if not found:
            raise DatasetNotFound("; ".join(self.missing_sets.values()) or "data.test: no dataset given. Name at least one")
        return found

    def train_loader(self, items: Dataset[Any], length: int, groups: np.ndarray | None = None) -> DataLoader[Any]:
        """Return an infinite loader of this rank's slice of each training batch; for a GPU, it copies batches ahead.

        Args:
            items: dataset that returns the slice for an output of `InfiniteBatchSampler`.
            length: number of items in one pass.
            groups: group of each item, (length,), for batches of one group; None for batches of all items.

        Raises:
            UserError: the batch size is not a multiple of the number of processes.
        """
        rank, world_size = self.rank_and_world_size
        if self.batch_size % world_size:
            raise UserError(
                f"data.batch_size: {self.batch_size} is not divisible by {world_size} processes. Use a multiple of {world_size}"
            )
        sampler = InfiniteBatchSampler(length, self.batch_size_at, self.seed, self.position, rank, world_size)
        if groups is not None:
            sampler = GroupedBatchSampler(groups, self.batch_size, self.seed, self.position, rank, world_size)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        self.deferred = None
        if isinstance(items, Storable) and not self.num_workers and fits(items.n_bytes, device):
            items = self.deferred = DeferredItems(items.on_device(device))
        target = device if copies_ahead(device) and self.deferred is None else None
        return make_loader(items, sampler, self.num_workers, target)

    def eval_loader(self, items: Dataset[Any], length: int) -> DataLoader[Any]:
        """Return a loader of this rank's evaluation items; see `RankSampler`."""
        return make_loader(items, RankSampler(length, *self.rank_and_world_size))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch of the loader to the device; it is on the CPU already."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> Mapping[str, Any]:
        """Prepare a batch on the device, for training or for evaluation."""
        if self.trainer is None or not self.trainer.training:
            return self.prepare_eval_batch(batch)
        return self.prepare_train_batch(batch if self.deferred is None else self.deferred.read(batch))

    @abstractmethod
    def prepare_train_batch(self, batch: dict[str, Any]) -> Mapping[str, Any]:
        """Convert the output of the training loader to a training batch, on the device."""

    def prepare_eval_batch(self, batch: dict[str, Any]) -> Mapping[str, Any]:
        """Convert the output of an evaluation loader to an evaluation batch, on the device; by default, return it unchanged."""
        return batch

    @classmethod
    def is_installed(cls, spec: str, init_args: dict[str, Any]) -> bool:
        """Return whether the dataset `spec` is installed, for a datamodule with the arguments `init_args`.

        Raises:
            DatasetNotFound: a dataset of image files is absent or incomplete.
            UserError: unknown dataset or split.
        """
        entry = catalog().get(spec.partition("/")[0])
        if entry and entry.arrays:
            return entry.status() == "installed"
        return bool(cls.list_items(spec, init_args))

    @classmethod
    def list_items(cls, spec: str, init_args: dict[str, Any]) -> Sequence[Any]:
        """List the items of a dataset of image files; by default its images."""
        return resolve_images(spec, init_args.get("scale"))

    def preview_images(self, count: int) -> Tensor | None:
        """Return real images for comparison with samples, (count, C, H, W) in [0, 1]; None if outputs contain real images."""
        return None

    def state_dict(self) -> dict[str, int]:
        """Return the settings that determine the order of the samples; the method stores the position as `images_seen`."""
        return {"batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Check that a checkpoint has the same order of samples.

        Raises:
            UserError: the batch size or seed differs from the checkpoint's.
        """
        for key in ("batch_size", "seed"):
            if state[key] != getattr(self, key):
                raise UserError(
                    f"data.{key}: {getattr(self, key)}, but the checkpoint's run had {state[key]}. "
                    "Use the value of the checkpoint, or start a new run"
                )
