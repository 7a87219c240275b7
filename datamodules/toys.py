"""Toy data: Gaussians and a spiral in the plane, and dummy batches for toy games."""

from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.generation import SampleIndices
from datamodules.io.image_set import ImageSet
from datamodules.random.noise import normal, uniform

POINTS_PER_PASS = 100_000


class Points(ResumableDataModule):
    """Points of a distribution in the plane.

    Training batches are {"point": (N, 2) float32}. Evaluation batches are sample indices, {"index": int64 (N,)}, with real
    points, {"point": (1000, 2)}. The attribute `reference_sets` contains the centers of the Gaussians, if there are any.

    Args:
        name: name of the distribution in logs.
        points: (POINTS_PER_PASS, 2).
        centers: (K, 2); empty for a distribution without centers.
        val_samples, batch_size, num_workers, seed: see `Ring`.
    """

    def __init__(
        self, name: str, points: Tensor, centers: Tensor, val_samples: int, batch_size: int, num_workers: int, seed: int
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.points, self.val_samples = points, val_samples
        self.reference_sets = {name: ImageSet(centers, torch.arange(len(centers)))} if len(centers) else {}
        self.test = list(self.reference_sets)

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
        return {**batch, "point": self.points[:1000].to(batch["index"].device)}


def gaussians(centers: Tensor, std: float, stream: str, seed: int) -> Tensor:
    """Sample points (POINTS_PER_PASS, 2) of Gaussians around centers (K, 2), each with the same number."""
    noise = torch.from_numpy(normal(seed, stream, range(POINTS_PER_PASS), 2)).float()
    return centers[torch.arange(POINTS_PER_PASS) % len(centers)] + std * noise


class Ring(Points):
    """Gaussians evenly spaced on a circle around the origin (Metz et al., arXiv:1611.02163, Section 3.1), see `Points`.

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
        angles = torch.arange(modes) * (2 * torch.pi / modes)
        centers = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
        super().__init__("ring", gaussians(centers, std, "ring", seed), centers, val_samples, batch_size, num_workers, seed)


class Grid(Points):
    """Gaussians on a square grid around the origin (Gulrajani et al., arXiv:1704.00028, Section 3), see `Points`.

    The defaults are those of the authors' code: spacing 2 and standard deviation 0.05, both divided by 2.828.

    Args:
        side: number of Gaussians in a row.
        spacing: distance between two neighbors.
        std: standard deviation of each Gaussian, in both directions.
        val_samples, batch_size, num_workers, seed: see `Ring`.
    """

    def __init__(
        self,
        side: PositiveInt = 5,
        spacing: PositiveFloat = 0.7072,
        std: NonNegativeFloat = 0.01768,
        val_samples: PositiveInt = 2_500,
        batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        offsets = spacing * (torch.arange(side) - (side - 1) / 2)
        centers = torch.cartesian_prod(offsets, offsets)
        super().__init__("grid", gaussians(centers, std, "grid", seed), centers, val_samples, batch_size, num_workers, seed)


class SwissRoll(Points):
    """A spiral of one and a half turns with Gaussian noise (Gulrajani et al., arXiv:1704.00028, Section 3), see `Points`.

    The defaults are those of the authors' code: scikit-learn's `make_swiss_roll` with noise 0.25, divided by 7.5.

    Args:
        radius: distance of the outer end from the origin.
        std: standard deviation of the noise, in both directions.
        val_samples, batch_size, num_workers, seed: see `Ring`.
    """

    def __init__(
        self,
        radius: PositiveFloat = 1.885,
        std: NonNegativeFloat = 0.03333,
        val_samples: PositiveInt = 2_500,
        batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        turn = 1.5 * torch.pi * (1 + 2 * torch.from_numpy(uniform(seed, "turn", range(POINTS_PER_PASS), 1)).float()[:, 0])
        spiral = radius / (4.5 * torch.pi) * turn[:, None] * torch.stack([turn.cos(), turn.sin()], dim=1)
        noise = torch.from_numpy(normal(seed, "roll", range(POINTS_PER_PASS), 2)).float()
        super().__init__("roll", spiral + std * noise, torch.empty(0, 2), val_samples, batch_size, num_workers, seed)


class PointBatches(Dataset[dict[str, Tensor]]):
    """Batches of points, indexed by the outputs of `InfiniteBatchSampler`."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        """Return {"point": float32 (B, 2)}."""
        _, items = slice_
        return {"point": self.points[torch.from_numpy(items)]}


class DummyBatches(Points):
    """Batches without meaningful content, for games without data; a validation generates one sample."""

    def __init__(self, batch_size: int = 1, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__("dummy", torch.zeros(POINTS_PER_PASS, 2), torch.empty(0, 2), 1, batch_size, num_workers, seed)
