"""Data of the toys: eight Gaussians on a circle, whose modes can be counted, and turns without data."""

from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.generation import SampleIndices
from datamodules.io.image_set import ImageSet
from datamodules.random.noise import normal

POINTS_PER_PASS = 100_000  # points


class Ring(ResumableDataModule):
    """Gaussians evenly on a circle around the origin (Metz et al., arXiv:1611.02163, Section 3.1).

    Training batches are {"point": (N, 2) float32}; to measure on there are numbers of samples, {"index": int64 (N,)}, and the
    centres of the Gaussians.

    Args:
        modes: how many; 1 with radius 0 is a plain Gaussian.
        radius: of the circle.
        std: of each Gaussian, in both directions.
        val_samples: how many samples a validation or test makes.
        batch_size: global batch, over all devices.
        num_workers: loader processes.
        seed: of the points.
    """

    def __init__(
        self,
        modes: PositiveInt = 8,
        radius: NonNegativeFloat = 2.0,
        std: NonNegativeFloat = 0.02,
        val_samples: PositiveInt = 2_500,
        batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.val_samples = val_samples
        angles = torch.arange(modes) * (2 * torch.pi / modes)
        centres = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
        self.reference_sets = {"ring": ImageSet(centres, torch.arange(modes))}
        spread = torch.from_numpy(normal(seed, "ring", range(POINTS_PER_PASS), 2)).float()
        self.points = centres[torch.arange(POINTS_PER_PASS) % modes] + std * spread
        self.test = ["ring"]

    def preview_images(self, count: int) -> Tensor:
        """Some of the points: (count, 2)."""
        return self.points[:count]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches of points."""
        return self.train_loader(PointBatches(self.points), POINTS_PER_PASS)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The numbers of the samples to make."""
        numbers = SampleIndices(self.val_samples, self.rank_and_world[1])
        return self.eval_loader(numbers, len(numbers))

    test_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Count the points taken."""
        if "point" in batch:
            self.samples_seen += self.batch_size
        return batch


class PointBatches(Dataset[dict[str, Tensor]]):
    """Batches of points, by what `InfiniteBatchSampler` yields."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        """{"point": (B, 2)}."""
        _, items = slice_
        return {"point": self.points[torch.from_numpy(items)]}


class DummyBatches(Ring):
    """Batches whose content does not matter, for a game without data; a validation looks once at where it stands."""

    def __init__(self, batch_size: int = 1, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(1, 0.0, 1.0, val_samples=1, batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.test = []
        self.reference_sets = {}

    def preview_images(self, count: int) -> Tensor:
        """There is nothing to imitate: (0, 2)."""
        return self.points[:0]
