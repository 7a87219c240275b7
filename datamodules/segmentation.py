"""Segmentation: deformed tiles to train on, whole pictures to measure on."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.catalog.catalog import DatasetNotFound, catalog
from datamodules.catalog.masked_images import MaskedImage, Sample, list_masked_images
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage, pixel_hash
from datamodules.io.image_refs import dataset_label
from datamodules.io.loader import make_loader
from datamodules.random.noise import uniform
from datamodules.sampler import RankSampler
from datamodules.transforms.augment import SpatialAugment
from datamodules.transforms.downsample import IGNORE_INDEX
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.weight_map import border_weight, class_weights, separate_instances


class Segmentation(ResumableDataModule):
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
        downscale: make pictures and masks this many times smaller first; figures are then of those.
        rotate, hflip, zoom, elastic_std: see `SpatialAugment`.
        contrast_jitter: by how much at most contrast and brightness vary, 0.2 for a fifth.
        border_weight: w0 of U-Net's eq. 2, the weight between cells that nearly touch; None for no weights at all, not even
            those that make the classes equal. Cells are the objects, or else the connected parts of class 1.
        batch_size: global batch, over all devices.
        streaming: read pictures as they are needed instead of keeping them decoded in memory; wants `num_workers`.
        num_workers: loader processes; 0 is fastest where pictures are kept in memory.
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
        downscale: int = 1,
        rotate: bool = False,
        hflip: bool = False,
        zoom: float = 1.0,
        elastic_std: float = 0.0,
        contrast_jitter: NonNegativeFloat = 0.0,
        border_weight: NonNegativeFloat | None = None,
        batch_size: int = 1,
        streaming: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.train, self.val, self.test = train, val, test
        self.classes, self.channels, self.instances = classes, channels, instances
        self.crop, self.margin, self.downscale = crop, margin, downscale
        self.augment = SpatialAugment(rotate, hflip, zoom, elastic_std)
        self.contrast_jitter, self.border_weight, self.streaming = contrast_jitter, border_weight, streaming
        self.classes_present: dict[str, set[int]] = {}  # classes in the masks of each set
        if border_weight is not None and streaming:
            raise UserError("data.border_weight: weights are made of pictures in memory; take --data.streaming false")
        if not 2 <= classes <= IGNORE_INDEX or channels not in (1, 3):
            raise UserError(f"data.classes: {classes} must be 2 to {IGNORE_INDEX}, data.channels: {channels} 1 or 3")
        if min(crop, downscale) < 1 or margin < 0 or margin % 2:
            raise UserError(f"data.crop: {crop} and data.downscale: {downscale} are at least 1, data.margin: {margin} is even")

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
            if not found[0].meaning.instances and len(self.classes_present[dataset_label(self.train)] - {IGNORE_INDEX}) < 2:
                raise UserError(
                    f"data.train: the masks of {self.train} have but one class; {IGNORE_INDEX} means that a pixel does not count: "
                    "save objects as 1, or set data.instances"
                )
            self.tiles: InMemoryTiles | StreamedTiles
            if self.streaming:
                self.tiles = StreamedTiles(
                    found, self.channels, self.downscale, self.crop, self.margin, self.augment, self.seed
                )
            else:
                self.tiles = InMemoryTiles(
                    self._read(found), self.crop, self.margin, self.augment, self.seed, self.border_weight
                )
        if stage in ("fit", "validate"):
            self.val_pictures = EvalImages(self._checked(self.val), self.channels, self.downscale)
        if stage == "test":
            self.test_pictures = EvalImages(self._load_test_sets(), self.channels, self.downscale)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by their ids."""
        known = next((names for names in (self._names(spec) for spec in (self.train, self.val, *self.test)) if names), ())
        return [known[i] if i < len(known) else f"class {i}" for i in range(self.classes)]

    def _names(self, spec: str) -> tuple[str, ...]:
        entry = catalog().get(spec.partition("/")[0])
        return tuple(entry.masks.get("classes", ())) if entry else ()

    def _load_test_sets(self) -> list[MaskedImage]:
        found: list[MaskedImage] = []
        names = [dataset_label(spec) for spec in self.test]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"data.test: two sets would both be called {twice[0]}; rename one of the folders")
        for spec in self.test:
            try:
                found += self._checked(spec)
            except DatasetNotFound as error:
                self.missing_sets.append(f"{spec}: {error}")
        if not found:
            raise DatasetNotFound("; ".join(self.missing_sets) or "data.test: names no data set")
        return found

    def _checked(self, spec: str) -> list[MaskedImage]:
        """The pictures of a set, each looked at with its mask; the survey takes note of both."""
        found = list_masked_images(spec, self.instances)
        with ThreadPoolExecutor() as pool:
            looks = list(pool.map(self._inspect, found))
        if reasons := [reason for reason, *_ in looks if reason]:
            raise InvalidImage(f"{len(reasons)} of {len(found)} pictures of {spec} cannot be used: {'; '.join(reasons)}")
        self.classes_present[dataset_label(spec)] = {kind for _, _, kinds in looks for kind in kinds}
        for labelled, (_, content, _) in zip(found, looks, strict=True):
            self.data_report.content_hashes.setdefault(labelled.picture.data_set, {})[labelled.picture.name] = content
        return found

    def _inspect(self, labelled: MaskedImage) -> tuple[str, str, list[int]]:
        """Why a picture cannot be used (empty if it can), what identifies it and its mask, and its classes."""
        try:
            pixels, values = labelled.read(self.channels)
            if min(values.shape) < self.downscale:
                raise InvalidImage(f"{labelled.picture.path}: too small to be shrunk by {self.downscale}")
        except InvalidImage as error:
            return str(error), "", []
        kinds = np.unique(values > 0 if labelled.meaning.instances else values).astype(int).tolist()
        if strange := [kind for kind in kinds if kind != IGNORE_INDEX and kind >= self.classes]:
            return f"{labelled.mask}: the class {strange[0]} is none of 0 ... {self.classes - 1} (data.classes)", "", []
        return "", f"{pixel_hash(pixels)} {pixel_hash(torch.from_numpy(values))}", kinds

    def _read(self, found: Sequence[MaskedImage]) -> list[Sample]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda labelled: labelled.load(self.channels, self.downscale), found))

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches of tiles."""
        if self.num_workers and isinstance(self.tiles, InMemoryTiles):
            self.tiles.share_memory()
        return self.train_loader(self.tiles, len(self.tiles))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The pictures that choose the checkpoint, one at a time."""
        return self._shared(self.val_pictures)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The pictures of all test sets, one at a time."""
        return self._shared(self.test_pictures)

    def _shared(self, pictures: "EvalImages") -> DataLoader[dict[str, Any]]:
        """This process's pictures; where there are fewer than processes, some measure the same ones, which count once."""
        rank, world = self.rank_and_world
        if rank < len(pictures):
            return self.eval_loader(pictures, len(pictures))
        return make_loader(pictures, RankSampler(len(pictures), rank % len(pictures), world))

    # A batch on its way

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """On the device, make floats in [0, 1] of the bytes, and of a training batch vary the contrast."""
        if "name" in batch:
            return {**batch, "image": batch["image"].float() / 255, "mask": batch["mask"].long()}
        self.samples_seen += self.batch_size
        return self.prepare_train_batch(batch)

    def prepare_train_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A training batch as the methods get it."""
        image = batch["image"].float() / 255
        if self.contrast_jitter:
            start = batch["start"]
            drawn = uniform(self.seed, "contrast", range(start, start + len(image)), 2)
            gain, shift = (
                torch.from_numpy(self.contrast_jitter * (2 * drawn - 1)).float().to(image.device).T.view(2, -1, 1, 1, 1)
            )
            middle = image.mean(dim=(1, 2, 3), keepdim=True)
            image = ((image - middle) * (1 + gain) + middle + shift).clamp(0, 1)
        kept = {"weight": batch["weight"]} if "weight" in batch else {}
        return {"image": image, "mask": batch["mask"].long(), **kept}


def separate_touching(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the cells to train on: where objects touch, a border of ground is put between them."""
    if not sample.instances:
        return sample.mask, sample.instance_ids
    instance_ids = separate_instances(sample.instance_ids)
    return (instance_ids > 0).astype(np.uint8), instance_ids


class RandomTiles(Dataset[dict[str, Any]]):
    """Batches of augmented tiles, indexed with what `InfiniteBatchSampler` yields: the first sample's position, and the items.

    Args:
        crop, margin, augment, seed: see `Segmentation`.
    """

    def __init__(self, crop: int, margin: int, augment: SpatialAugment, seed: int) -> None:
        self.crop, self.margin, self.augment, self.seed = crop, margin, augment, seed

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
        coords = self.augment.sampling_grid(self.seed, samples, heights, widths, self.crop, self.margin)
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
        crop, margin, augment, seed, weight: see `Segmentation`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        crop: int,
        margin: int,
        augment: SpatialAugment,
        seed: int,
        weight: float | None = None,
    ) -> None:
        super().__init__(crop, margin, augment, seed)
        with ThreadPoolExecutor() as pool:
            masks, instance_ids = zip(*pool.map(separate_touching, samples), strict=True)
        self.images = RaggedImageBuffer([sample.pixels for sample in samples])
        self.masks = RaggedImageBuffer([torch.from_numpy(mask)[None] for mask in masks])
        self.weights: RaggedImageBuffer | None = None
        if weight is not None:
            counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=IGNORE_INDEX + 1)
            of_class = np.append(class_weights(counts[:IGNORE_INDEX]), np.float32(0))
            with ThreadPoolExecutor() as pool:
                between = list(pool.map(lambda ids: border_weight(ids, weight), instance_ids))
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
        self,
        files: Sequence[MaskedImage],
        channels: int,
        downscale: int,
        crop: int,
        margin: int,
        augment: SpatialAugment,
        seed: int,
    ) -> None:
        super().__init__(crop, margin, augment, seed)
        self.files, self.channels, self.downscale = files, channels, downscale

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """See `RandomTiles.sample`."""
        start, items = slice_
        found = [self.files[item].load(self.channels, self.downscale) for item in items]
        images = RaggedImageBuffer([sample.pixels for sample in found])
        masks = RaggedImageBuffer([torch.from_numpy(separate_touching(sample)[0])[None] for sample in found])
        return self.sample(images, masks, None, np.arange(len(items)), start)


class EvalImages(Dataset[dict[str, Any]]):
    """Pictures to measure on, one at a time."""

    def __init__(self, pictures: Sequence[MaskedImage], channels: int, downscale: int) -> None:
        self.pictures, self.channels, self.downscale = pictures, channels, downscale

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 (1, C, H, W), "mask": uint8 (1, H, W), "cells": int32 (1, H, W), "name": [str], "dataset": [str]}."""
        labelled = self.pictures[index]
        sample = labelled.load(self.channels, self.downscale)
        return {
            "image": sample.pixels[None],
            "mask": torch.from_numpy(sample.mask)[None],
            "cells": torch.from_numpy(sample.instance_ids)[None],
            "name": [labelled.picture.name],
            "dataset": [labelled.picture.data_set],
        }
