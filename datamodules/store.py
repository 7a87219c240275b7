"""Decoded images in one uint8 buffer, cut into patches a batch at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ImageStore:
    """Grey images of any sizes, one behind another in a flat uint8 buffer.

    Args:
        images: uint8 (1, H, W) each.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        self.heights = np.array([image.shape[-2] for image in images], dtype=np.int64)
        self.widths = np.array([image.shape[-1] for image in images], dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.heights * self.widths)])
        self.pixels = torch.cat([image.reshape(-1) for image in images])

    def __len__(self) -> int:
        return len(self.heights)

    def share(self) -> None:
        """Move the buffer to shared memory, so that loader workers, forked or spawned, read this one copy."""
        self.pixels.share_memory_()

    def patches(self, which: np.ndarray, top: np.ndarray, left: np.ndarray, size: int, symmetry: np.ndarray) -> Tensor:
        """Cut one square patch from each of the named images, turned and mirrored on the way.

        Args:
            which: (B,) image numbers.
            top, left: (B,) corners; a patch may reach beyond its image, whose border is replicated.
            size: side in pixels.
            symmetry: (B,) in 0..7, the eight symmetries of the square: bits 1 and 2 mirror rows and columns, bit 4 transposes.

        Returns:
            uint8 (B, 1, size, size).
        """
        steps = np.arange(size)
        mirror_rows, mirror_columns, transpose = ((symmetry[:, None] & bit) > 0 for bit in (1, 2, 4))
        rows = top[:, None] + np.where(mirror_rows, steps[::-1], steps)  # (B, size)
        columns = left[:, None] + np.where(mirror_columns, steps[::-1], steps)
        rows = np.clip(rows, 0, self.heights[which, None] - 1) * self.widths[which, None]
        columns = np.clip(columns, 0, self.widths[which, None] - 1)
        down = np.where(transpose, columns, rows) + self.offsets[which, None]
        across = np.where(transpose, rows, columns)
        index = torch.from_numpy(down)[:, :, None] + torch.from_numpy(across)[:, None, :]  # (B, size, size)
        return self.pixels[index].unsqueeze(1)
