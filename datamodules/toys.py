"""Toy data: a ring of Gaussians for mode coverage, and dummy batches for toy games."""

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

POINTS_PER_PASS = 100_000


class Ring(ResumableDataModule):
    """Gaussians evenly spaced on a circle around the origin (Metz et al., arXiv:1611.02163, Section 3.1).

    Training batches are {"point": (N, 2) float32}. Evaluation batches are sample indices, {"index": int64 (N,)}, with real
    points, {"point": (1000, 2)}. The attribute `reference_sets` contains the centers of the Gaussians.

    Args:
        modes: number of Gaussians; 1 with radius 0 is a single centered Gaussian.
        radius: radius of the circle.
        std: standard deviation of each Gaussian, in both directions.
        val_samples: number of generated samples per validation or test.
        batch_size: global batch size, over all devices.
        num_workers: loader processes.
        seed: seed of the points.
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
        centers = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
        self.reference_sets = {"ring": ImageSet(centers, torch.arange(modes))}
        noise = torch.from_numpy(normal(seed, "ring", range(POINTS_PER_PASS), 2)).float()
        self.points = centers[torch.arange(POINTS_PER_PASS) % modes] + std * noise
        self.test = ["ring"]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return an infinite loader of points."""
        return self.train_loader(PointBatches(self.points), POINTS_PER_PASS)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return a loader of the indices of samples to generate."""
        indices = SampleIndices(self.val_samples, self.val_samples)
        return self.eval_loader(indices, len(indices))

    test_dataloader = val_dataloader

    def prepare_train_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch unchanged."""
        return batch

    def prepare_eval_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add 1,000 real points as "point"."""
        return {**batch, "point": self.points[:1000]}


class PointBatches(Dataset[dict[str, Tensor]]):
    """Batches of points, indexed by the outputs of `InfiniteBatchSampler`."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        """Return {"point": float32 (B, 2)}."""
        _, items = slice_
        return {"point": self.points[torch.from_numpy(items)]}


class DummyBatches(Ring):
    """Batches without meaningful content, for games without data; a validation generates one sample."""

    def __init__(self, batch_size: int = 1, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(1, 0.0, 1.0, val_samples=1, batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.test = []
        self.reference_sets = {}
