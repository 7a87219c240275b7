"""A flat buffer of images of different sizes with batched cropping."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datamodules.transforms.reflect import reflect_index


class RaggedImageBuffer:
    """Images of any sizes, concatenated in a flat buffer of pixels.

    Args:
        images: (C, H, W) each, with equal dtype and number of channels.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        self.heights = np.array([image.shape[-2] for image in images], dtype=np.int64)
        self.widths = np.array([image.shape[-1] for image in images], dtype=np.int64)
        areas = self.heights * self.widths
        self.offsets = np.cumsum(areas) - areas
        self.pixels = torch.cat([image.flatten(1).T for image in images])  # (all pixels, C)

    def __len__(self) -> int:
        return len(self.heights)

    def share_memory(self) -> None:
        """Move the buffer to shared memory, so that all loader workers read one copy."""
        self.pixels.share_memory_()

    def image(self, index: int) -> Tensor:
        """Return an image, (C, H, W)."""
        height, width, start = int(self.heights[index]), int(self.widths[index]), int(self.offsets[index])
        return self.pixels[start : start + height * width].T.reshape(-1, height, width)

    def crop_patches(self, image_ids: np.ndarray, top: np.ndarray, left: np.ndarray, size: int, symmetry: np.ndarray) -> Tensor:
        """Crop one square patch from each of the given images, flipped or transposed.

        Args:
            image_ids: (B,) indices of images.
            top, left: (B,) corners in pixels; where a patch exceeds its image, the border is replicated.
            size: side in pixels.
            symmetry: (B,) in 0..7, the symmetries of the square as a bit mask: 1 flips rows, 2 flips columns, 4 transposes.

        Returns:
            (B, C, size, size).
        """
        steps = np.arange(size)
        flip_rows, flip_columns, transpose = ((symmetry[:, None] & bit) > 0 for bit in (1, 2, 4))
        rows = top[:, None] + np.where(flip_rows, steps[::-1], steps)  # (B, size)
        columns = left[:, None] + np.where(flip_columns, steps[::-1], steps)
        rows = np.clip(rows, 0, self.heights[image_ids, None] - 1) * self.widths[image_ids, None]
        columns = np.clip(columns, 0, self.widths[image_ids, None] - 1)
        down = np.where(transpose, columns, rows) + self.offsets[image_ids, None]
        across = np.where(transpose, rows, columns)
        index = torch.from_numpy(down)[:, :, None] + torch.from_numpy(across)[:, None, :]  # (B, size, size)
        return self._gather(index)

    def sample_nearest(self, image_ids: np.ndarray, coords: Tensor) -> Tensor:
        """Sample the nearest pixel at each coordinate, with reflection at the borders.

        Args:
            image_ids: (B,) indices of images.
            coords: rows and columns, (B, 2, h, w), in pixels; 0 is the center of the first pixel.

        Returns:
            (B, C, h, w).
        """
        return self._read_reflected(image_ids, (coords + 0.5).floor().long())

    def sample_bilinear(self, image_ids: np.ndarray, coords: Tensor) -> Tensor:
        """Sample by bilinear interpolation; arguments and shape as in `sample_nearest`, but the result is float32."""
        first = coords.floor()
        fraction = coords - first  # weights of the next row and the next column
        down, across = fraction[:, :1], fraction[:, 1:]
        corner = first.long()
        steps = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).view(4, 1, 2, 1, 1)
        top_left, top_right, bottom_left, bottom_right = (
            self._read_reflected(image_ids, corner + step).float() for step in steps
        )
        top = torch.lerp(top_left, top_right, across)
        return torch.lerp(top, torch.lerp(bottom_left, bottom_right, across), down)

    def _read_reflected(self, image_ids: np.ndarray, coords: Tensor) -> Tensor:
        offsets, heights, widths = (
            torch.from_numpy(values[image_ids]).view(-1, 1, 1) for values in (self.offsets, self.heights, self.widths)
        )
        return self._gather(offsets + reflect_index(coords[:, 0], heights) * widths + reflect_index(coords[:, 1], widths))

    def _gather(self, index: Tensor) -> Tensor:
        """Gather the pixels at flat positions (B, h, w): (B, C, h, w)."""
        if self.pixels.shape[1] == 1:
            return self.pixels[:, 0][index].unsqueeze(1)
        return self.pixels[index].movedim(-1, 1)
