"""Segmentation: deformed tiles to train on, whole pictures to measure on."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import Stream
from datamodules.catalog.catalog import MissingData, catalogue
from datamodules.catalog.masked_images import Labelled, Sample, labelled_pictures
from datamodules.errors import Refused
from datamodules.io.image_io import BadImage, pixel_hash
from datamodules.io.image_refs import slug
from datamodules.io.loader import load
from datamodules.random.noise import uniform
from datamodules.sampler import Slice
from datamodules.transforms.augment import Deformation
from datamodules.transforms.downsample import IGNORE
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.weight_map import balance, parted, separation


class Segmentation(Stream):
    """Pictures with a class for each pixel, some of them with numbered objects.

    Training batches are {"image": (N, channels, crop + margin, crop + margin) float32 in [0, 1], "mask": (N, crop, crop) int64,
    255 where a pixel does not count} and, if so asked, "weight": (N, crop, crop) float32. To measure on, pictures come one at
    a time, whole: {"image", "mask", "cells", "name", "dataset"}, where "cells" (1, H, W) int32 numbers the objects.

    Args:
        train: a set of the catalogue ("camvid/train"), or a folder with `images` and `masks`.
        val: the same, to choose the checkpoint on.
        test: sets to measure on; those that are absent are named and left out.
        classes: how many; masks with other ids are refused.
        channels: of an image, 1 or 3; grey pictures are repeated to 3.
        instances: the masks of folders of one's own are numbers of objects, whose classes are ground (0) and object (1).
        crop: side of what a training sample has classes for, in pixels.
        margin: by how much its image is larger, half of it on every side: what the network's valid convolutions take away.
        shrink: make pictures and masks this many times smaller first; figures are then of those.
        turn, mirror, zoom, elastic: see `Deformation`.
        contrast: by how much at most contrast and brightness vary, 0.2 for a fifth.
        separation: w0 of U-Net's eq. 2, the weight between cells that nearly touch; None for no weights at all, not even
            those that make the classes equal. Cells are the objects, or else the connected parts of class 1.
        batch_size: global batch, over all devices.
        streaming: read pictures as they are needed instead of keeping them decoded in memory; wants `workers`.
        workers: loader processes; 0 is fastest where pictures are kept in memory.
        seed: of the order and of all deformation.
    """

    def __init__(
        self,
        train: str,
        val: str,
        classes: int,
        test: Sequence[str] = (),
        channels: int = 3,
        instances: bool = False,
        crop: int = 256,
        margin: int = 0,
        shrink: int = 1,
        turn: bool = False,
        mirror: bool = False,
        zoom: float = 1.0,
        elastic: float = 0.0,
        contrast: NonNegativeFloat = 0.0,
        separation: NonNegativeFloat | None = None,
        batch_size: int = 1,
        streaming: bool = False,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        self.train, self.val, self.test = train, val, test
        self.classes, self.channels, self.instances = classes, channels, instances
        self.crop, self.margin, self.shrink = crop, margin, shrink
        self.deformation = Deformation(turn, mirror, zoom, elastic)
        self.contrast, self.separation, self.streaming = contrast, separation, streaming
        self.present: dict[str, set[int]] = {}  # classes in the masks of each set
        if separation is not None and streaming:
            raise Refused("data.separation: weights are made of pictures in memory; take --data.streaming false")
        if not 2 <= classes <= IGNORE or channels not in (1, 3):
            raise Refused(f"data.classes: {classes} must be 2 to {IGNORE}, data.channels: {channels} 1 or 3")
        if min(crop, shrink) < 1 or margin < 0 or margin % 2:
            raise Refused(f"data.crop: {crop} and data.shrink: {shrink} are at least 1, data.margin: {margin} is even")

    # What is where

    def setup(self, stage: str) -> None:
        """Find, read and check the pictures and masks of a stage.

        Raises:
            MissingData: what is to be trained or measured on is not here.
            BadImage: pictures or masks are unusable; the message names each of them.
            Refused: there is but one class to learn, or two sets have the same name.
        """
        if stage == "fit":
            found = self._checked(self.train)
            if not found[0].meaning.instances and len(self.present[slug(self.train)] - {IGNORE}) < 2:
                raise Refused(
                    f"data.train: the masks of {self.train} have but one class; {IGNORE} means that a pixel does not count: "
                    "save objects as 1, or set data.instances"
                )
            self.tiles: InMemoryTiles | StreamedTiles
            if self.streaming:
                self.tiles = StreamedTiles(
                    found, self.channels, self.shrink, self.crop, self.margin, self.deformation, self.seed
                )
            else:
                self.tiles = InMemoryTiles(
                    self._read(found), self.crop, self.margin, self.deformation, self.seed, self.separation
                )
        if stage in ("fit", "validate"):
            self.val_pictures = WholePictures(self._checked(self.val), self.channels, self.shrink)
        if stage == "test":
            self.test_pictures = WholePictures(self._tests(), self.channels, self.shrink)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by their ids."""
        known = next((names for names in (self._names(spec) for spec in (self.train, self.val, *self.test)) if names), ())
        return [known[i] if i < len(known) else f"class {i}" for i in range(self.classes)]

    def _names(self, spec: str) -> tuple[str, ...]:
        entry = catalogue().get(spec.partition("/")[0])
        return tuple(entry.masks.get("classes", ())) if entry else ()

    def _tests(self) -> list[Labelled]:
        found: list[Labelled] = []
        names = [slug(spec) for spec in self.test]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise Refused(f"data.test: two sets would both be called {twice[0]}; rename one of the folders")
        for spec in self.test:
            try:
                found += self._checked(spec)
            except MissingData as error:
                self.absent.append(f"{spec}: {error}")
        if not found:
            raise MissingData("; ".join(self.absent) or "data.test: names no data set")
        return found

    def _checked(self, spec: str) -> list[Labelled]:
        """The pictures of a set, each looked at with its mask; the survey takes note of both."""
        found = labelled_pictures(spec, self.instances)
        with ThreadPoolExecutor() as pool:
            looks = list(pool.map(self._look, found))
        if reasons := [reason for reason, *_ in looks if reason]:
            raise BadImage(f"{len(reasons)} of {len(found)} pictures of {spec} cannot be used: {'; '.join(reasons)}")
        self.present[slug(spec)] = {kind for _, _, kinds in looks for kind in kinds}
        for labelled, (_, content, _) in zip(found, looks, strict=True):
            self.survey.contents.setdefault(labelled.picture.data_set, {})[labelled.picture.name] = content
        return found

    def _look(self, labelled: Labelled) -> tuple[str, str, list[int]]:
        """Why a picture cannot be used (empty if it can), what identifies it and its mask, and its classes."""
        try:
            pixels, values = labelled.read(self.channels)
            if min(values.shape) < self.shrink:
                raise BadImage(f"{labelled.picture.path}: too small to be shrunk by {self.shrink}")
        except BadImage as error:
            return str(error), "", []
        kinds = np.unique(values > 0 if labelled.meaning.instances else values).astype(int).tolist()
        if strange := [kind for kind in kinds if kind != IGNORE and kind >= self.classes]:
            return f"{labelled.mask}: the class {strange[0]} is none of 0 ... {self.classes - 1} (data.classes)", "", []
        return "", f"{pixel_hash(pixels)} {pixel_hash(torch.from_numpy(values))}", kinds

    def _read(self, found: Sequence[Labelled]) -> list[Sample]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda labelled: labelled.sample(self.channels, self.shrink), found))

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches of tiles."""
        if self.workers and isinstance(self.tiles, InMemoryTiles):
            self.tiles.share_memory()
        return self.endless(self.tiles, len(self.tiles))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The pictures that choose the checkpoint, one at a time."""
        return self._shared(self.val_pictures)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The pictures of all test sets, one at a time."""
        return self._shared(self.test_pictures)

    def _shared(self, pictures: "WholePictures") -> DataLoader[dict[str, Any]]:
        """This process's pictures; where there are fewer than processes, some measure the same ones, which count once."""
        rank, world = self.place
        if rank < len(pictures):
            return self.dealt(pictures, len(pictures))
        return load(pictures, Slice(len(pictures), rank % len(pictures), world))

    # A batch on its way

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """On the device, make floats in [0, 1] of the bytes, and of a training batch vary the contrast."""
        if "name" in batch:
            return {**batch, "image": batch["image"].float() / 255, "mask": batch["mask"].long()}
        self.position += self.batch_size
        return self.floats(batch)

    def floats(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A training batch as the methods get it."""
        image = batch["image"].float() / 255
        if self.contrast:
            start = batch["start"]
            drawn = uniform(self.seed, "contrast", range(start, start + len(image)), 2)
            gain, shift = torch.from_numpy(self.contrast * (2 * drawn - 1)).float().to(image.device).T.view(2, -1, 1, 1, 1)
            middle = image.mean(dim=(1, 2, 3), keepdim=True)
            image = ((image - middle) * (1 + gain) + middle + shift).clamp(0, 1)
        kept = {"weight": batch["weight"]} if "weight" in batch else {}
        return {"image": image, "mask": batch["mask"].long(), **kept}


def apart(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the cells to train on: where objects touch, a border of ground is put between them."""
    if not sample.instances:
        return sample.mask, sample.cells
    cells = parted(sample.cells)
    return (cells > 0).astype(np.uint8), cells


class RandomTiles(Dataset[dict[str, Any]]):
    """Batches of augmented tiles, indexed with what `EndlessBatches` yields: the first sample's position, and the items.

    Args:
        crop, margin, deformation, seed: see `Segmentation`.
    """

    def __init__(self, crop: int, margin: int, deformation: Deformation, seed: int) -> None:
        self.crop, self.margin, self.deformation, self.seed = crop, margin, deformation, seed

    def sample(
        self,
        images: RaggedImageBuffer,
        masks: RaggedImageBuffer,
        weights: RaggedImageBuffer | None,
        image_ids: np.ndarray,
        start: int,
    ) -> dict[str, Any]:
        """Sample tiles of the images `image_ids` (B,) for the samples from position `start` on.

        Returns:
            {"image": uint8 (B, C, crop + margin, ...), "mask": uint8 (B, crop, crop), "weight" with `weights`, "start"}.
        """
        samples = range(start, start + len(image_ids))
        heights, widths = images.heights[image_ids], images.widths[image_ids]
        coords = self.deformation.places(self.seed, samples, heights, widths, self.crop, self.margin)
        half = self.margin // 2
        inner = coords[..., half : half + self.crop, half : half + self.crop]
        image = images.sample_bilinear(image_ids, coords).round().to(torch.uint8)
        batch = {"image": image, "mask": masks.sample_nearest(image_ids, inner)[:, 0], "start": start}
        if weights is not None:
            batch["weight"] = weights.sample_bilinear(image_ids, inner)[:, 0]
        return batch


class InMemoryTiles(RandomTiles):
    """Tiles of decoded images; in one pass, an image gives as many as would cover it side by side.

    Args:
        samples: the images and masks.
        crop, margin, deformation, seed, weight: see `Segmentation`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        crop: int,
        margin: int,
        deformation: Deformation,
        seed: int,
        weight: float | None = None,
    ) -> None:
        super().__init__(crop, margin, deformation, seed)
        with ThreadPoolExecutor() as pool:
            masks, cells = zip(*pool.map(apart, samples), strict=True)
        self.images = RaggedImageBuffer([sample.pixels for sample in samples])
        self.masks = RaggedImageBuffer([torch.from_numpy(mask)[None] for mask in masks])
        self.weights: RaggedImageBuffer | None = None
        if weight is not None:
            counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=IGNORE + 1)
            of_class = np.append(balance(counts[:IGNORE]), np.float32(0))
            with ThreadPoolExecutor() as pool:
                between = list(pool.map(lambda ids: separation(ids, weight), cells))
            self.weights = RaggedImageBuffer(
                [torch.from_numpy(of_class[mask] + added)[None] for mask, added in zip(masks, between, strict=True)]
            )
        tiles = np.round(self.images.heights * self.images.widths / crop**2).astype(int)
        self.image_ids = np.repeat(np.arange(len(self.images)), np.maximum(1, tiles))

    def __len__(self) -> int:
        return len(self.image_ids)

    def share_memory(self) -> None:
        """Move the buffers to shared memory."""
        for buffer in (self.images, self.masks, self.weights):
            if buffer is not None:
                buffer.share_memory()

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """See `RandomTiles.sample`."""
        start, items = slice_
        return self.sample(self.images, self.masks, self.weights, self.image_ids[items], start)


class StreamedTiles(RandomTiles):
    """The same for datasets that do not fit into memory, without weights: an image is read when its turn comes.

    Every image is one item of a pass, whatever its size.
    """

    def __init__(
        self, files: Sequence[Labelled], channels: int, shrink: int, crop: int, margin: int, deformation: Deformation, seed: int
    ) -> None:
        super().__init__(crop, margin, deformation, seed)
        self.files, self.channels, self.shrink = files, channels, shrink

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """See `RandomTiles.sample`."""
        start, items = slice_
        found = [self.files[item].sample(self.channels, self.shrink) for item in items]
        images = RaggedImageBuffer([sample.pixels for sample in found])
        masks = RaggedImageBuffer([torch.from_numpy(apart(sample)[0])[None] for sample in found])
        return self.sample(images, masks, None, np.arange(len(items)), start)


class WholePictures(Dataset[dict[str, Any]]):
    """Pictures to measure on, one at a time."""

    def __init__(self, pictures: Sequence[Labelled], channels: int, shrink: int) -> None:
        self.pictures, self.channels, self.shrink = pictures, channels, shrink

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 (1, C, H, W), "mask": uint8 (1, H, W), "cells": int32 (1, H, W), "name": [str], "dataset": [str]}."""
        labelled = self.pictures[index]
        sample = labelled.sample(self.channels, self.shrink)
        return {
            "image": sample.pixels[None],
            "mask": torch.from_numpy(sample.mask)[None],
            "cells": torch.from_numpy(sample.cells)[None],
            "name": [labelled.picture.name],
            "dataset": [labelled.picture.data_set],
        }
