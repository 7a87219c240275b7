"""Data sets behind the super-resolution datamodule: batches of training patches, and whole pictures to measure on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.catalog.catalog import catalog
from datamodules.io.image_io import read_image
from datamodules.io.image_refs import ImageRef
from datamodules.random.philox import randint_from_words, random_words
from datamodules.transforms.color import luma
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.resize import imresize

# An LR pixel of the antialiased bicubic kernel looks 2 LR pixels far; patches are cut larger by that, and lose it again.
KERNEL_MARGIN = 2


class RandomPatches(Dataset[dict[str, Tensor]]):
    """Batches of patches at random places of images.

    Indexed with what `InfiniteBatchSampler` yields: the position of the first sample, and the items of the batch.

    Args:
        seed: of the places and symmetries.
        size: side of a patch in pixels.
        grid: corners lie on multiples of this (the scale), so that LR pixels fall where the whole image's do.
        border_overhang: pixels by which a patch may reach beyond its image, a multiple of `grid`.
    """

    def __init__(self, seed: int, size: int, grid: int, border_overhang: int) -> None:
        self.seed, self.size, self.grid, self.border_overhang = seed, size, grid, border_overhang

    def crop(self, store: RaggedImageBuffer, image_ids: np.ndarray, start: int) -> dict[str, Tensor]:
        """Crop patches of the images `image_ids` (B,) for the samples from position `start` on.

        Returns:
            {"patches": uint8 (B, 1, size, size)}.
        """
        words = random_words(self.seed, "crop", start, len(image_ids))  # (B, 4)
        corners = []
        for lengths, word in ((store.heights, words[:, 0]), (store.widths, words[:, 1])):
            places = (lengths[image_ids] + 2 * self.border_overhang - self.size) // self.grid + 1
            corners.append(randint_from_words(word, places) * self.grid - self.border_overhang)
        return {"patches": store.crop_patches(image_ids, corners[0], corners[1], self.size, randint_from_words(words[:, 2], 8))}


class InMemoryPatches(RandomPatches):
    """Patches of decoded images; in one pass, an image gives as many as would cover it side by side.

    Args:
        store: the images, heights and widths multiples of `grid`.
        seed, size, grid, border_overhang: see `RandomPatches`.
    """

    def __init__(self, store: RaggedImageBuffer, seed: int, size: int, grid: int, border_overhang: int) -> None:
        super().__init__(seed, size, grid, border_overhang)
        self.store = store
        patches = np.round(store.heights * store.widths / size**2).astype(int)
        self.image_ids = np.repeat(np.arange(len(store)), np.maximum(1, patches))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        """See `RandomPatches.crop`."""
        start, items = slice_
        return self.crop(self.store, self.image_ids[items], start)


class StreamedPatches(RandomPatches):
    """The same for datasets that do not fit into memory: each sample's image is read when its turn comes.

    Every image is one item of a pass, whatever its size.

    Args:
        files: the images.
        seed, size, grid, border_overhang: see `RandomPatches`.
    """

    def __init__(self, files: Sequence[Path], seed: int, size: int, grid: int, border_overhang: int) -> None:
        super().__init__(seed, size, grid, border_overhang)
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        """See `RandomPatches.crop`."""
        start, items = slice_
        store = RaggedImageBuffer([read_luma(self.files[item], self.grid) for item in items])
        return self.crop(store, np.arange(len(items)), start)


class SREvalImages(Dataset[dict[str, Any]]):
    """Whole pictures in the setting of the tables: crop, luma, shrink in floating point without quantising.

    Args:
        pictures: of any data sets.
        scale: how much smaller the input is.
    """

    def __init__(self, pictures: Sequence[ImageRef], scale: int) -> None:
        self.pictures, self.scale = pictures, scale

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"input": (1, 1, h, w), "target": (1, 1, h * scale, w * scale), "name": [str], "dataset": [str]}."""
        picture = self.pictures[index]
        known = catalog().get(picture.data_set)
        target = read_luma(picture.path, self.scale, known.treat_equal_rgb_as_grey if known else False).double() / 255
        low = imresize(target, (target.shape[-2] // self.scale, target.shape[-1] // self.scale))
        names = {"name": [picture.name], "dataset": [picture.data_set]}
        return {"input": low.float()[None], "target": target.float()[None], **names}


def read_luma(path: Path, multiple: int, treat_equal_rgb_as_grey: bool = False) -> Tensor:
    """A picture's luma, cropped at the bottom and right: uint8 (1, H, W), H and W multiples of `multiple`."""
    pixels = read_image(path)
    height, width = (length - length % multiple for length in pixels.shape[-2:])
    return luma(pixels[:, :height, :width], treat_equal_rgb_as_grey)
