"""A flat buffer of images of different sizes with batched cropping."""

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

from datamodules.transforms.reflect import reflect_index
from datamodules.transforms.to_device import to_device_async

LARGE = 64  # side in pixels from which patches are copied by rows


class RaggedImageBuffer:
    """Images of any sizes, concatenated in a flat buffer of pixels.

    Args:
        images: (C, H, W) each, with equal dtype and number of channels.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        pixels = torch.cat([image.flatten(1).T for image in images])
        self._set(pixels, [image.shape[-2] for image in images], [image.shape[-1] for image in images])

    @classmethod
    def from_pixels(cls, pixels: Tensor, heights: Sequence[int], widths: Sequence[int]) -> "RaggedImageBuffer":
        """Use the pixels of images, such as those of a file that is mapped into memory, without a copy.

        Args:
            pixels: those of all images, one after the other, (all pixels, C).
            heights, widths: sizes of the images.
        """
        buffer = cls.__new__(cls)
        buffer._set(pixels, heights, widths)
        return buffer

    def _set(self, pixels: Tensor, heights: Sequence[int], widths: Sequence[int]) -> None:
        self.pixels = pixels  # (all pixels, C)
        self.heights, self.widths = np.array(heights, dtype=np.int64), np.array(widths, dtype=np.int64)
        areas = self.heights * self.widths
        self.offsets = np.cumsum(areas) - areas

    def __len__(self) -> int:
        return len(self.heights)

    def on_device(self, device: torch.device) -> "RaggedImageBuffer":
        """Return a copy whose pixels are on a device; the sizes of the images stay on the CPU."""
        moved = copy(self)
        moved.pixels = self.pixels.to(device)
        return moved

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
        if self.pixels.device.type != "cpu":
            return self.crop_on_device(image_ids, top, left, size, symmetry)
        if size >= LARGE and (left >= 0).all() and (left + size <= self.widths[image_ids]).all():
            return self._copy_rows(image_ids, top, left, size, symmetry)
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

    def crop_on_device(
        self, image_ids: np.ndarray, top: np.ndarray, left: np.ndarray, size: int, symmetry: np.ndarray
    ) -> Tensor:
        """Compute `crop_patches` on the device of the pixels; one copy sends the corners to it."""
        lengths = (values[image_ids] for values in (self.heights, self.widths, self.offsets))
        table = np.stack([top, left, symmetry, *lengths]).astype(np.int64)[..., None]
        corner_top, corner_left, flips, heights, widths, offsets = to_device_async(table, self.pixels.device)  # (B, 1) each
        steps = torch.arange(size, device=self.pixels.device)
        rows = corner_top + torch.where((flips & 1) > 0, steps.flip(0), steps)  # (B, size)
        columns = corner_left + torch.where((flips & 2) > 0, steps.flip(0), steps)
        rows = torch.minimum(rows.clamp(min=0), heights - 1) * widths
        columns = torch.minimum(columns.clamp(min=0), widths - 1)
        down = torch.where((flips & 4) > 0, columns, rows) + offsets
        across = torch.where((flips & 4) > 0, rows, columns)
        return channels_first(self.pixels[down[:, :, None] + across[:, None, :]])

    def _copy_rows(self, image_ids: np.ndarray, top: np.ndarray, left: np.ndarray, size: int, symmetry: np.ndarray) -> Tensor:
        """Crop patches that do not exceed their images to the left or right: each of their rows is contiguous."""
        steps, channels = np.arange(size), self.pixels.shape[1]
        rows = top[:, None] + np.where((symmetry[:, None] & 1) > 0, steps[::-1], steps)  # (B, size)
        rows = np.clip(rows, 0, self.heights[image_ids, None] - 1) * self.widths[image_ids, None]
        starts = torch.from_numpy(rows + (self.offsets[image_ids] + left)[:, None])
        runs = self.pixels.as_strided((len(self.pixels) - size + 1, size * channels), (channels, 1))  # from each pixel on
        patches = runs.index_select(0, starts.flatten()).view(len(image_ids), size, size, channels)
        values = patches.numpy()  # numpy copies whole patches, ten times as fast as torch
        for bit, change in ((2, mirrored), (4, lambda pixels: pixels.transpose(1, 2))):
            changed = np.flatnonzero(symmetry & bit)
            if len(changed):
                values[changed] = change(torch.from_numpy(values[changed])).contiguous().numpy()
        return channels_first(patches)

    def sample_nearest(self, image_ids: np.ndarray, coords: Tensor) -> Tensor:
        """Sample the nearest pixel at each coordinate, with reflection at the borders.

        Args:
            image_ids: (B,) indices of images.
            coords: rows and columns, (B, 2, h, w), in pixels; 0 is the center of the first pixel.

        Returns:
            (B, C, h, w).
        """
        rows, columns = reflect(self._placement(image_ids), (coords + 0.5).floor())
        return self._gather(rows + columns)

    def sample_bilinear(self, image_ids: np.ndarray, coords: Tensor) -> Tensor:
        """Sample by bilinear interpolation; arguments and shape as in `sample_nearest`, but the result is float32."""
        first = coords.floor()
        fraction = coords - first  # weights of the next row and the next column
        down, across = fraction[:, :1], fraction[:, 1:]
        placement = self._placement(image_ids)
        rows, columns = zip(*(reflect(placement, corner) for corner in (first, first + 1)), strict=True)
        (top_left, top_right), (bottom_left, bottom_right) = (
            [self._gather(row + column).float() for column in columns] for row in rows
        )
        top = torch.lerp(top_left, top_right, across)
        return torch.lerp(top, torch.lerp(bottom_left, bottom_right, across), down)

    def _placement(self, image_ids: np.ndarray) -> Tensor:
        """Return the offsets, heights and widths of images on the device of the pixels: int64 (3, B, 1, 1)."""
        table = np.stack([values[image_ids] for values in (self.offsets, self.heights, self.widths)])
        return to_device_async(table, self.pixels.device)[:, :, None, None]

    def _gather(self, index: Tensor) -> Tensor:
        """Gather the pixels at flat positions (B, h, w): (B, C, h, w)."""
        if self.pixels.device.type != "cpu":
            return channels_first(self.pixels[index])
        return channels_first(torch.from_numpy(np.take(self.pixels.numpy(), index.numpy(), axis=0)))  # faster than torch's


def reflect(placement: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
    """Reflect whole coordinates (B, 2, h, w) at the borders of images.

    Args:
        placement: offsets, heights and widths of the images, (3, B, 1, 1).
        coords: rows and columns in pixels.

    Returns:
        The flat positions of the first pixels of rows, and the columns: int64 (B, h, w) each.
    """
    offsets, heights, widths = placement
    rows, columns = (reflect_index(coords[:, axis], length) for axis, length in enumerate((heights, widths)))
    return offsets + rows.long() * widths, columns.long()


def channels_first(pixels: Tensor) -> Tensor:
    """Return a view (B, C, h, w) of pixels (B, h, w, C); of one channel, one that is not in the format channels-last."""
    return pixels[..., 0].unsqueeze(1) if pixels.shape[-1] == 1 else pixels.movedim(-1, 1)


def mirrored(pixels: Tensor) -> Tensor:
    """Flip pixels (B, h, w, C) left to right; with channels first, torch has a fast kernel."""
    return channels_first(pixels).flip(3).movedim(1, -1)
