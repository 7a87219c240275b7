"""Data sets behind the super-resolution datamodule: batches of training patches, and whole pictures to measure on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.catalogue import catalogue
from datamodules.colour import luma
from datamodules.images import read_image
from datamodules.pictures import Picture
from datamodules.randomness import below, draws
from datamodules.resize import imresize
from datamodules.store import ImageStore

# An LR pixel of the antialiased bicubic kernel looks 2 LR pixels far; patches are cut larger by that, and lose it again.
REACH = 2


class StoredPatches(Dataset[dict[str, Tensor]]):
    """Batches of patches at random places of decoded images.

    Indexed with what `EndlessBatches` yields: the position of the first sample, and the items of the batch.

    Args:
        store: the images, heights and widths multiples of `grid`.
        seed: of the places and symmetries.
        size: side of a patch in pixels.
        grid: corners lie on multiples of this (the scale), so that LR pixels fall where the whole picture's do.
        overhang: pixels by which a patch may reach beyond its image, a multiple of `grid`.
    """

    def __init__(self, store: ImageStore, seed: int, size: int, grid: int, overhang: int) -> None:
        self.store, self.seed, self.size, self.grid, self.overhang = store, seed, size, grid, overhang
        # In one pass, a picture gives as many patches as would cover it side by side.
        share = np.round(store.heights * store.widths / size**2).astype(int)
        self.images = np.repeat(np.arange(len(store)), np.maximum(1, share))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        """{"patches": uint8 (B, 1, size, size)}."""
        start, items = slice_
        return {"patches": self.cut(self.store, self.images[items], draws(self.seed, "crop", start, len(items)))}

    def cut(self, store: ImageStore, which: np.ndarray, words: np.ndarray) -> Tensor:
        """Patches of the images `which` (B,) of a store, at places and in symmetries given by random words (B, 4)."""
        corners = []
        for lengths, word in ((store.heights, words[:, 0]), (store.widths, words[:, 1])):
            places = (lengths[which] + 2 * self.overhang - self.size) // self.grid + 1
            corners.append(below(word, places) * self.grid - self.overhang)
        return store.patches(which, corners[0], corners[1], self.size, below(words[:, 2], 8))


class StreamedPatches(StoredPatches):
    """The same batches for sets that do not fit into memory: each sample's picture is read when its turn comes.

    Every picture is one item of a pass, whatever its size.

    Args:
        files: the pictures.
        seed, size, grid, overhang: see `StoredPatches`.
    """

    def __init__(self, files: Sequence[Path], seed: int, size: int, grid: int, overhang: int) -> None:
        self.files, self.seed, self.size, self.grid, self.overhang = files, seed, size, grid, overhang

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        """{"patches": uint8 (B, 1, size, size)}."""
        start, items = slice_
        store = ImageStore([read_luma(self.files[item], self.grid) for item in items])
        return {"patches": self.cut(store, np.arange(len(items)), draws(self.seed, "crop", start, len(items)))}


class Pictures(Dataset[dict[str, Any]]):
    """Whole pictures in the setting of the tables: crop, luma, shrink in floating point without quantising.

    Args:
        pictures: of any data sets.
        scale: how much smaller the input is.
    """

    def __init__(self, pictures: Sequence[Picture], scale: int) -> None:
        self.pictures, self.scale = pictures, scale

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"input": (1, 1, h, w), "target": (1, 1, h * scale, w * scale), "name": [str], "dataset": [str]}."""
        picture = self.pictures[index]
        known = catalogue().get(picture.data_set)
        target = read_luma(picture.path, self.scale, known.equal_is_grey if known else False).double() / 255
        low = imresize(target, (target.shape[-2] // self.scale, target.shape[-1] // self.scale))
        names = {"name": [picture.name], "dataset": [picture.data_set]}
        return {"input": low.float()[None], "target": target.float()[None], **names}


def read_luma(path: Path, multiple: int, equal_is_grey: bool = False) -> Tensor:
    """A picture's luma, cropped at the bottom and right: uint8 (1, H, W), H and W multiples of `multiple`."""
    pixels = read_image(path)
    height, width = (length - length % multiple for length in pixels.shape[-2:])
    return luma(pixels[:, :height, :width], equal_is_grey)
