"""Datasets of the super-resolution datamodule: batches of training patches, and full evaluation images."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.catalog.catalog import catalog
from datamodules.io.image_io import read_image, to_channels
from datamodules.io.image_refs import ImageRef
from datamodules.random.philox import randint_from_words, random_words
from datamodules.transforms.color import is_gray, luma
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.resize import imresize

# The antialiased bicubic kernel covers 2 LR pixels on each side; patches are cropped with this margin.
KERNEL_MARGIN = 2


class RandomPatches(Dataset[dict[str, Tensor]]):
    """Batches of patches at random positions of images.

    The index is an output of `InfiniteBatchSampler`: the position of the first sample, and the items of the batch.

    Args:
        seed: seed of the positions and symmetries.
        size: side of a patch in pixels.
        grid: divisor of all corner coordinates (the scale); it aligns the LR pixels of patch and image.
        border_overhang: pixels by which a patch may exceed its image, a multiple of `grid`.
    """

    def __init__(self, seed: int, size: int, grid: int, border_overhang: int) -> None:
        self.seed, self.size, self.grid, self.border_overhang = seed, size, grid, border_overhang

    def crop(self, image_buffer: RaggedImageBuffer, image_ids: np.ndarray, start: int) -> dict[str, Tensor]:
        """Crop patches of the images `image_ids` (B,) for the samples from position `start` on.

        Returns:
            {"patches": uint8 (B, C, size, size)}.
        """
        words = random_words(self.seed, "crop", start, len(image_ids))  # (B, 4)
        corners = []
        for lengths, word in ((image_buffer.heights, words[:, 0]), (image_buffer.widths, words[:, 1])):
            n_positions = (lengths[image_ids] + 2 * self.border_overhang - self.size) // self.grid + 1
            corners.append(randint_from_words(word, n_positions) * self.grid - self.border_overhang)
        return {
            "patches": image_buffer.crop_patches(
                image_ids, corners[0], corners[1], self.size, randint_from_words(words[:, 2], 8)
            )
        }


class InMemoryPatches(RandomPatches):
    """Patches of decoded images; in one pass, an H x W image yields round(H W / size**2) patches, at least one.

    Args:
        image_buffer: images with heights and widths that are multiples of `grid`.
        seed, size, grid, border_overhang: see `RandomPatches`.
    """

    def __init__(self, image_buffer: RaggedImageBuffer, seed: int, size: int, grid: int, border_overhang: int) -> None:
        super().__init__(seed, size, grid, border_overhang)
        self.image_buffer = image_buffer
        patches_per_image = np.round(image_buffer.heights * image_buffer.widths / size**2).astype(int)
        self.image_ids = np.repeat(np.arange(len(image_buffer)), np.maximum(1, patches_per_image))

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def n_bytes(self) -> int:
        """Size of the images in bytes."""
        return self.image_buffer.pixels.nbytes

    def on_device(self, device: torch.device) -> "InMemoryPatches":
        """Return a copy on a device; see `Storable`."""
        moved = copy(self)
        moved.image_buffer = self.image_buffer.on_device(device)
        return moved

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        """See `RandomPatches.crop`."""
        start, items = slice_
        return self.crop(self.image_buffer, self.image_ids[items], start)


class StreamedPatches(RandomPatches):
    """Patches of images that are decoded on demand, for datasets larger than memory.

    In one pass, every image yields one patch.

    Args:
        files: image files.
        channels: 1 for luma or 3 for RGB.
        seed, size, grid, border_overhang: see `RandomPatches`.
    """

    def __init__(self, files: Sequence[Path], channels: int, seed: int, size: int, grid: int, border_overhang: int) -> None:
        super().__init__(seed, size, grid, border_overhang)
        self.files, self.channels = files, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        """See `RandomPatches.crop`."""
        start, items = slice_
        image_buffer = RaggedImageBuffer([read_pixels(self.files[item], self.grid, self.channels) for item in items])
        return self.crop(image_buffer, np.arange(len(items)), start)


class SREvalImages(Dataset[dict[str, Any]]):
    """Full images as in the papers' tables: cropped, and downscaled in floating point without quantization.

    Args:
        refs: images of any datasets.
        scale: upscaling factor.
        channels: 1 for luma or 3 for RGB. Gray photographs have one channel.
    """

    def __init__(self, refs: Sequence[ImageRef], scale: int, channels: int = 1) -> None:
        self.refs, self.scale, self.channels = refs, scale, channels

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"input": (1, C, h, w), "target": (1, C, h * scale, w * scale), "name": [str], "dataset": [str]}."""
        ref = self.refs[index]
        entry = catalog().get(ref.dataset)
        equal_is_gray = entry is not None and entry.treat_equal_rgb_as_gray
        pixels = read_cropped(ref.path, self.scale)
        if self.channels == 1 or (equal_is_gray and is_gray(pixels)):
            pixels = luma(pixels, equal_is_gray)
        target = pixels.double() / 255
        lr = imresize(target, (target.shape[-2] // self.scale, target.shape[-1] // self.scale))
        names = {"name": [ref.name], "dataset": [ref.dataset]}
        return {"input": lr.float()[None], "target": target.float()[None], **names}


def read_cropped(path: Path, multiple: int) -> Tensor:
    """Read an image file, see `crop_to_multiple`: uint8 (1 or 3, H, W)."""
    return crop_to_multiple(read_image(path), multiple)


def read_pixels(path: Path, multiple: int, channels: int) -> Tensor:
    """Read luma (1 channel) or RGB (3 channels) of an image file, see `crop_to_multiple`: uint8 (channels, H, W)."""
    return convert_pixels(read_image(path), multiple, channels)


def convert_pixels(pixels: Tensor, multiple: int, channels: int) -> Tensor:
    """Compute what `read_pixels` returns from the pixels of the file."""
    cropped = crop_to_multiple(pixels, multiple)
    return luma(cropped) if channels == 1 else to_channels(cropped, 3)


def crop_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Crop an image (C, H, W) at the bottom and right to multiples of `multiple`."""
    height, width = (length - length % multiple for length in pixels.shape[-2:])
    return pixels[:, :height, :width]
