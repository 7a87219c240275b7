"""Spatial augmentation in one sampling grid: shift, rotation, zoom, flip and U-Net's elastic deformation.

O. Ronneberger, P. Fischer, T. Brox. U-Net. arXiv:1505.04597, Section 3.1.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.errors import UserError
from datamodules.random.noise import normal, uniform
from datamodules.transforms.to_device import to_device_async

CPU = torch.device("cpu")
GRID = 3  # displacement vectors along each axis of the coarse grid


@dataclass(frozen=True)
class SpatialAugment:
    """Random spatial transforms of a tile.

    Args:
        rotate: whether to rotate by a random angle in [0, 360) degrees.
        hflip: whether to flip left to right with probability 0.5.
        zoom: maximum zoom factor; the logarithm is uniform in [-log zoom, log zoom]; 1 for no zoom.
        elastic_std: std in pixels of the displacement vectors on a 3 x 3 grid, interpolated bicubically; 0 for none.

    Raises:
        UserError: `zoom` is less than 1, or `elastic_std` is negative.
    """

    rotate: bool = False
    hflip: bool = False
    zoom: float = 1.0
    elastic_std: float = 0.0

    def __post_init__(self) -> None:
        if self.zoom < 1 or self.elastic_std < 0:
            raise UserError(
                f"data.zoom: {self.zoom} must be at least 1; data.elastic_std: {self.elastic_std} must be at least 0"
            )

    def sampling_grid(
        self,
        seed: int,
        samples: range,
        heights: np.ndarray,
        widths: np.ndarray,
        tile_size: int,
        margin: int,
        device: torch.device = CPU,
    ) -> Tensor:
        """Return the image coordinates of each pixel of a tile, with half of the margin on each side.

        A tile has a uniform random position within its image, or is centered if the image is smaller. The deformation and the
        margin may extend beyond the image. The result is a function of the seed and of each sample's position.

        Args:
            seed: the run's seed.
            samples: positions of B samples.
            heights, widths: (B,) sizes of the samples' images in pixels.
            tile_size, margin: sizes in pixels.
            device: device of the result; the random numbers and the angles are computed on the CPU.

        Returns:
            Rows and columns, float32 (B, 2, tile_size + margin, tile_size + margin), 0 at the center of the first pixel.
        """
        noise = uniform(seed, "deformation", samples, 5)
        lengths = np.stack([heights, widths], axis=1)
        slack = np.maximum(lengths - tile_size, 0)
        # Integer positions, so that an undeformed tile needs no interpolation.
        corners = np.minimum((noise[:, :2] * (slack + 1)).astype(np.int64), slack) + np.minimum(lengths - tile_size, 0) // 2
        centers = torch.from_numpy(corners + (tile_size - 1) / 2).float()  # (B, 2)
        directions = torch.from_numpy(np.where(self.hflip & (noise[:, 2] < 0.5), -1.0, 1.0)).float()
        angle = torch.from_numpy(noise[:, 3] * 2 * np.pi * self.rotate).float()
        zoom_factor = torch.from_numpy(self.zoom ** (2 * noise[:, 4] - 1)).float()
        table = torch.stack([*centers.T, directions, torch.cos(angle) / zoom_factor, torch.sin(angle) / zoom_factor])
        table = to_device_async(table[:, :, None, None], device)
        center_rows, center_columns, direction, cosine, sine = table  # (B, 1, 1) each
        side = tile_size + margin
        steps = torch.arange(side, dtype=torch.float32, device=device) - (side - 1) / 2
        rows, columns = steps[:, None], steps * direction  # (side, 1), (B, 1, side)
        rotated = torch.stack([cosine * rows - sine * columns, sine * rows + cosine * columns], dim=1)
        center = torch.stack([center_rows, center_columns], dim=1)
        return rotated + center + self.elastic_field(seed, samples, side, device)

    def elastic_field(self, seed: int, samples: range, side: int, device: torch.device = CPU) -> Tensor:
        """Return elastic displacements in pixels: float32 (B, 2, side, side); a scalar 0 if `elastic_std` is 0."""
        if not self.elastic_std:
            return torch.zeros((), device=device)
        noise = normal(seed, "displacement", samples, 2 * GRID**2).reshape(-1, 2, GRID, GRID)
        displacements = to_device_async(torch.from_numpy(self.elastic_std * noise).float(), device)
        return F.interpolate(displacements, (side, side), mode="bicubic", align_corners=True)
