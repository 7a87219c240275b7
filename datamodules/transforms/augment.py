"""Where the pixels of a deformed tile come from: shift, turn, zoom, mirror, and U-Net's elastic deformation, as one map.

O. Ronneberger, P. Fischer, T. Brox. U-Net. arXiv:1505.04597, Section 3.1.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.errors import UserError
from datamodules.random.noise import normal, uniform

GRID = 3  # coarse displacement vectors in each direction


@dataclass(frozen=True)
class SpatialAugment:
    """What may happen to a tile.

    Args:
        rotate: by any angle.
        hflip: left to right, in half of the cases; with `rotate`, that is every reflection.
        zoom: by how much at most it is enlarged or shrunk, evenly in the logarithm; 1 for not at all.
        elastic_std: deviation of the displacement vectors of a 3 x 3 grid, in pixels; between them it is bicubic.
    """

    rotate: bool = False
    hflip: bool = False
    zoom: float = 1.0
    elastic_std: float = 0.0

    def __post_init__(self) -> None:
        if self.zoom < 1 or self.elastic_std < 0:
            raise UserError(f"data.zoom: {self.zoom} must be 1 at least, data.elastic_std: {self.elastic_std} not below 0")

    def sampling_grid(
        self, seed: int, samples: range, heights: np.ndarray, widths: np.ndarray, tile: int, margin: int
    ) -> Tensor:
        """Where in its picture each pixel of a tile lies, with half of a margin around it on every side.

        Tiles lie anywhere within their pictures (in the middle of smaller ones); what deformation and margin add may lie
        beyond. A function of the seed and of each sample's position.

        Args:
            seed: the run's.
            samples: positions (B of them).
            heights, widths: (B,) of the samples' pictures.
            tile, margin: in pixels.

        Returns:
            Rows and columns, float32 (B, 2, tile + margin, tile + margin), from the middle of the first pixel.
        """
        drawn = uniform(seed, "deformation", samples, 5)
        lengths = np.stack([heights, widths], axis=1)
        free = np.maximum(lengths - tile, 0)
        # In whole pixels, so that a tile which is not deformed needs no interpolation.
        corners = np.minimum((drawn[:, :2] * (free + 1)).astype(np.int64), free) + np.minimum(lengths - tile, 0) // 2
        centres = torch.from_numpy(corners + (tile - 1) / 2).float()  # (B, 2)
        steps = torch.arange(tile + margin, dtype=torch.float32) - (tile + margin - 1) / 2
        across = steps * torch.from_numpy(np.where(self.hflip & (drawn[:, 2] < 0.5), -1.0, 1.0)).float()[:, None]
        angle = torch.from_numpy(drawn[:, 3] * 2 * np.pi * self.rotate).float()
        size = torch.from_numpy(self.zoom ** (2 * drawn[:, 4] - 1)).float()
        cosine, sine = (f(angle)[:, None, None] / size[:, None, None] for f in (torch.cos, torch.sin))
        rows, columns = steps[None, :, None], across[:, None, :]
        turned = torch.stack([cosine * rows - sine * columns, sine * rows + cosine * columns], dim=1)
        return turned + centres[:, :, None, None] + self.elastic_field(seed, samples, tile + margin)

    def elastic_field(self, seed: int, samples: range, side: int) -> Tensor:
        """The elastic part, in pixels: (B, 2, side, side), or zero."""
        if not self.elastic_std:
            return torch.zeros(())
        drawn = normal(seed, "displacement", samples, 2 * GRID**2).reshape(-1, 2, GRID, GRID)
        return F.interpolate(
            torch.from_numpy(self.elastic_std * drawn).float(), (side, side), mode="bicubic", align_corners=True
        )
