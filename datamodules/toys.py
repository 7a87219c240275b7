"""Data of the toys: eight Gaussians on a circle, whose modes can be counted, and turns without data."""

from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import Stream
from datamodules.generation import Numbers
from datamodules.io.image_set import Images
from datamodules.random.noise import normal

PASS = 100_000  # points


class Ring(Stream):
    """Gaussians evenly on a circle around the origin (Metz et al., arXiv:1611.02163, Section 3.1).

    Training batches are {"point": (N, 2) float32}; to measure on there are numbers of samples, {"index": int64 (N,)}, and the
    centres of the Gaussians.

    Args:
        modes: how many; 1 with radius 0 is a plain Gaussian.
        radius: of the circle.
        deviation: of each Gaussian, in both directions.
        samples: how many samples a validation or test makes.
        batch_size: global batch, over all devices.
        workers: loader processes.
        seed: of the points.
    """

    def __init__(
        self,
        modes: PositiveInt = 8,
        radius: NonNegativeFloat = 2.0,
        deviation: NonNegativeFloat = 0.02,
        samples: PositiveInt = 2_500,
        batch_size: int = 512,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        self.samples = samples
        angles = torch.arange(modes) * (2 * torch.pi / modes)
        centres = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
        self.real = {"ring": Images(centres, torch.arange(modes))}
        spread = torch.from_numpy(normal(seed, "ring", range(PASS), 2)).float()
        self.points = centres[torch.arange(PASS) % modes] + deviation * spread
        self.test = ["ring"]

    def examples(self, count: int) -> Tensor:
        """Some of the points: (count, 2)."""
        return self.points[:count]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches of points."""
        return self.endless(Rows(self.points), PASS)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The numbers of the samples to make."""
        numbers = Numbers(self.samples, self.place[1])
        return self.dealt(numbers, len(numbers))

    test_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Count the points taken."""
        if "point" in batch:
            self.position += self.batch_size
        return batch


class Rows(Dataset[dict[str, Tensor]]):
    """Batches of points, by what `EndlessBatches` yields."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        """{"point": (B, 2)}."""
        _, items = slice_
        return {"point": self.points[torch.from_numpy(items)]}


class Turns(Ring):
    """Batches whose content does not matter, for a game without data; a validation looks once at where it stands."""

    def __init__(self, batch_size: int = 1, workers: int = 0, seed: int = 0) -> None:
        super().__init__(1, 0.0, 1.0, samples=1, batch_size=batch_size, workers=workers, seed=seed)
        self.test = []
        self.real = {}

    def examples(self, count: int) -> Tensor:
        """There is nothing to imitate: (0, 2)."""
        return self.points[:0]
