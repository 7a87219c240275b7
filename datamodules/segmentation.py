"""Segmentation: augmented training tiles and full evaluation images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import ResumableDataModule
from datamodules.batches import SegmentationBatch
from datamodules.catalog.catalog import HELD_OUT, catalog
from datamodules.catalog.held_out import HeldOut, read_class_names
from datamodules.catalog.masked_image import MaskedImage, MaskedSample, MaskSpec
from datamodules.catalog.masked_images import list_masked_images, pair_folders
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage, pixel_hash
from datamodules.io.image_refs import dataset_label
from datamodules.io.value_range import ValueRange
from datamodules.random.noise import uniform
from datamodules.segmentation_datasets import InMemoryTiles, SegmentationEvalImages, StreamedTiles
from datamodules.transforms.augment import SpatialAugment
from datamodules.transforms.downsample import IGNORE_INDEX
from datamodules.transforms.to_device import to_device_async

DARK = 0.25  # share of the range of the files: a camera of 12 bits in files of 16 bits uses 1/16
TRAIN, VAL = "training images", "validation images"  # roles, in place of the name of a dataset


class Inspection(NamedTuple):
    """What is known of an image with a mask before training.

    Args:
        reason: why it is unusable; empty if it is usable.
        content: hash of its pixels and its mask.
        class_ids: class ids in its mask.
        white: largest value, up to 255.
    """

    reason: str = ""
    content: str = ""
    class_ids: Sequence[int] = ()
    white: float = 0.0


class Segmentation(ResumableDataModule):
    """Images with a class for each pixel, optionally with instance ids.

    Yields `SegmentationBatch` with masks of side `crop`, and with weights if `border_weight` is given; and
    `SegmentationEvalBatch`, see `datamodules/batches.py`.

    A folder contains subfolders `images` and `masks`, with the same names, apart from one ending of all masks. `images` and
    `masks` name two other folders instead. A share of the images is held out for validation if no validation images are given:
    the dataset `held-out`. All pages of a stack (a TIFF file) are in the same share.

    Args:
        train: training images: a dataset of the catalog ("camvid/train"), or a folder; None if `images` and `masks` are given.
        val: validation images; None to hold out a share of the training images.
        test: datasets to evaluate, which can include `held-out`; absent ones are reported and skipped.
        images, masks: a folder of images and a folder of their masks, or a CSV file of run lengths, in place of `train`.
        mask_format: format of the masks of folders: "ids" (0, 1, ...; 255 for ignored pixels), "binary" (0 for the background
            and any other value for objects), "colors" (those of `class_colors`), or "rle" (the run lengths of a CSV file).
        class_names: names of the classes in the order of their ids, or a text file of them, one per line; () for the names of
            the catalog.
        class_colors: color (R, G, B) of each class in the masks, from 0 to 255; also the colors of the overlays of `predict`.
        val_fraction: share of the held-out images.
        fold: "K/N" holds out the K-th of N equal shares, for cross-validation; None for `val_fraction`.
        value_range: black and white of the images of folders, in training and in `predict`: see `ValueRange`.
        num_classes: number of classes; masks with other ids raise an error.
        channels: image channels, 1 or 3; grayscale images are repeated to 3.
        instances: whether the masks of folders are instance ids; their classes are background (0) and object (1).
        crop: side of the mask of a training tile in pixels.
        margin: pixels by which the image of a tile is larger than its mask (half on every side), for valid convolutions.
        downscale: integer factor by which images and masks are reduced after reading; metrics refer to the reduced size.
        rotate, hflip, zoom, elastic_std: see `SpatialAugment`.
        contrast_jitter: maximum relative change of contrast and absolute change of brightness; 0 for none.
        border_weight: w0 of U-Net's eq. 2, the weight between close cells; None for no weights, including class weights.
            Cells are the instances, or the connected components of class 1 if there are no instance ids.
        batch_size: global batch size, over all devices.
        streaming: decode images on demand instead of keeping them in memory; use with `num_workers`.
        num_workers: loader processes; 0 is fastest for images in memory.
        seed: seed of the order and of the augmentation.

    Raises:
        UserError: an argument is out of range, or `border_weight` is combined with `streaming`.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        num_classes: int = 2,
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
        images: str | None = None,
        masks: str | None = None,
        mask_format: Literal["ids", "binary", "colors", "rle"] = "ids",
        class_names: Sequence[str] | str = (),
        class_colors: Sequence[tuple[int, int, int]] = (),
        val_fraction: ClosedUnitInterval = 0.2,
        fold: str | None = None,
        value_range: ValueRange = "dtype",
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.train, self.val, self.test = train, val, test
        self.num_classes, self.channels, self.instances = num_classes, channels, instances
        self.crop, self.margin, self.downscale = crop, margin, downscale
        self.augment = SpatialAugment(rotate, hflip, zoom, elastic_std)
        self.contrast_jitter, self.border_weight, self.streaming = contrast_jitter, border_weight, streaming
        self.classes_present: dict[str, set[int]] = {}  # dataset name -> class ids in its masks
        self.images, self.masks, self.value_range = images, masks, value_range
        self.held_out = HeldOut(val_fraction, fold)
        self.own_class_names = read_class_names(class_names, num_classes)
        self.class_colors = [(red, green, blue) for red, green, blue in class_colors]
        self.mask_spec = MaskSpec(instances=instances, mask_format=mask_format, colors=tuple(self.class_colors))
        self._check_folders(mask_format, fold)
        if border_weight is not None and streaming:
            raise UserError("data.border_weight: requires images in memory. Use --data.streaming false, or null for no weights")
        if not 2 <= num_classes <= IGNORE_INDEX or channels not in (1, 3):
            raise UserError(
                f"data.num_classes: {num_classes} must be 2 to {IGNORE_INDEX}; data.channels: {channels} must be 1 or 3"
            )
        if min(crop, downscale) < 1 or margin < 0 or margin % 2:
            raise UserError(
                f"data.crop: {crop} and data.downscale: {downscale} must be at least 1; "
                f"data.margin: {margin} must be even and at least 0"
            )

    # Setup

    def setup(self, stage: str) -> None:
        """Locate, read and validate the images and masks of a stage.

        Raises:
            DatasetNotFound: a dataset is not installed.
            InvalidImage: images or masks are unusable; the message names each of them.
            UserError: the training masks have only one class, a dataset has no masks, or two test sets have the same name.
        """
        if stage == "fit":
            masked_images = self._validate_set(TRAIN)
            if (
                not masked_images[0].mask_spec.instances
                and len(self.classes_present[masked_images[0].image.dataset] - {IGNORE_INDEX}) < 2
            ):
                raise UserError(
                    "data.train: the masks have only one class. Save the classes as 0, 1, ..., or set data.instances"
                )
            self.tiles: InMemoryTiles | StreamedTiles
            if self.streaming:
                self.tiles = StreamedTiles(
                    masked_images, self.channels, self.downscale, self.crop, self.margin, self.augment, self.seed
                )
            else:
                self.tiles = InMemoryTiles(
                    self._read(masked_images), self.crop, self.margin, self.augment, self.seed, self.border_weight
                )
        if stage in ("fit", "validate"):
            self.val_images = SegmentationEvalImages(self._validate_set(VAL), self.channels, self.downscale)
        if stage == "test":
            self.test_images = SegmentationEvalImages(self._load_test_sets(), self.channels, self.downscale)

    @classmethod
    def list_items(cls, spec: str, init_args: dict[str, Any]) -> Sequence[Any]:
        """List the images with masks."""
        if spec == HELD_OUT and (images := init_args.get("images")):
            mask_spec = MaskSpec(mask_format=init_args.get("mask_format", "ids"))
            return pair_folders(Path(images), Path(str(init_args.get("masks"))), HELD_OUT, mask_spec)
        return list_masked_images(init_args["train"] if spec == HELD_OUT else spec)

    @property
    def class_names(self) -> list[str]:
        """Class names by class id."""
        specs = [spec for spec in (self.train, self.val, *self.test) if spec]
        declared = self.own_class_names or next((names for names in map(self._catalog_class_names, specs) if names), ())
        return [declared[i] if i < len(declared) else f"class {i}" for i in range(self.num_classes)]

    def _check_folders(self, mask_format: str, fold: str | None) -> None:
        """Check the keys that name folders and the format of their masks.

        Raises:
            UserError: they contradict each other.
        """
        if (self.images is None) != (self.masks is None) or (self.images is None) == (self.train is None):
            raise UserError(
                "data.train: give either data.train, or both data.images and data.masks. "
                "Add --data.train null --data.val null, or use a recipe for folders, such as unet/folder"
            )
        if fold is not None and self.val is not None:
            raise UserError(f"data.fold: {fold} holds out training images, but data.val is {self.val}. Use --data.val null")
        if not isinstance(self.value_range, str) and not self.value_range[0] < self.value_range[1]:
            raise UserError(f"data.value_range: black {self.value_range[0]} must be below white {self.value_range[1]}")
        if (mask_format == "rle") != (self.masks is not None and self.masks.endswith(".csv")):
            raise UserError("data.masks: must be a .csv file for data.mask_format rle, and a folder for the others")
        if (mask_format == "colors" or self.class_colors) and len(self.class_colors) != self.num_classes:
            raise UserError(
                f"data.class_colors: {len(self.class_colors)} colors. Give one for each of {self.num_classes} classes"
            )
        if mask_format == "colors" and self.instances:
            raise UserError("data.instances: masks of colors have classes, not objects. Use false")

    def _list(self, spec: str) -> list[MaskedImage]:
        """List the images of a role (TRAIN, VAL) or of a test set."""
        if spec == HELD_OUT and self.val is not None:
            raise UserError(f"data.test: {HELD_OUT} requires data.val null, but it is {self.val}. Name a dataset")
        if spec == VAL and self.val is not None:
            spec = self.val
        if spec not in (TRAIN, VAL, HELD_OUT):
            images = list_masked_images(spec, self.instances, folder_spec=self.mask_spec)
        elif self.images is not None and self.masks is not None:
            images = pair_folders(Path(self.images), Path(self.masks), dataset_label(self.images), self.mask_spec)
        else:
            assert self.train is not None
            images = list_masked_images(self.train, self.instances, folder_spec=self.mask_spec)
        if spec in (TRAIN, VAL, HELD_OUT) and self.val is None:
            images = self.held_out.select(images, training=spec == TRAIN)
        return [replace(image, value_range=self.value_range) for image in images]

    def list_training_images(self) -> list[MaskedImage]:
        """List the training images with their masks."""
        return self._list(TRAIN)

    def _catalog_class_names(self, spec: str) -> tuple[str, ...]:
        entry = catalog().get(spec.partition("/")[0])
        return tuple(entry.masks.get("classes", ())) if entry else ()

    def _load_test_sets(self) -> list[MaskedImage]:
        return [image for images in self.read_test_sets(self._validate_set) for image in images]

    def _validate_set(self, spec: str) -> list[MaskedImage]:
        """Return the images of a dataset after validating them with their masks, and record their content hashes."""
        masked_images = self._list(spec)
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(self._inspect, masked_images))
        if reasons := [result.reason for result in results if result.reason]:
            raise InvalidImage(
                f"{len(reasons)} of {len(masked_images)} images of {masked_images[0].image.dataset} cannot be used. "
                f"Replace or remove them: {'; '.join(reasons)}"
            )
        present = {class_id for result in results for class_id in result.class_ids}
        if present == {0, IGNORE_INDEX} and not masked_images[0].mask_spec.instances:
            raise UserError(
                f"{masked_images[0].mask}: the masks contain only 0 and 255, and 255 marks ignored pixels. "
                "If it marks objects, set data.mask_format binary"
            )
        self.classes_present[masked_images[0].image.dataset] = present
        dataset = masked_images[0].image.dataset
        for masked_image, result in zip(masked_images, results, strict=True):
            self.data_report.content_hashes.setdefault(dataset, {})[masked_image.image.name] = result.content
        self.data_report.note_losses(dataset, dict.fromkeys(masked_image.image.path for masked_image in masked_images))
        if self.value_range == "dtype" and (white := max(result.white for result in results)) < DARK * 255:
            self.data_report.notes.append(
                f"{dataset}: the largest value is {white / 255:.0%} of the range of the files, so the images are dark. "
                "Set data.value_range to percentile, or to [BLACK, WHITE]"
            )
        return masked_images

    def _inspect(self, masked_image: MaskedImage) -> Inspection:
        """Read an image and its mask."""
        try:
            pixels, values = masked_image.read(self.channels)
            if min(values.shape) < self.downscale:
                raise InvalidImage(f"{masked_image.image.path}: too small to be reduced by the factor {self.downscale}")
        except InvalidImage as error:
            return Inspection(reason=str(error))
        class_ids = np.unique(values > 0 if masked_image.mask_spec.instances else values).astype(int).tolist()
        if unknown := [class_id for class_id in class_ids if class_id != IGNORE_INDEX and class_id >= self.num_classes]:
            known = f"0 ... {self.num_classes - 1}; increase data.num_classes"
            return Inspection(reason=f"{masked_image.mask}: class {unknown[0]} is not in {known}")
        content = f"{pixel_hash(pixels)} {pixel_hash(torch.from_numpy(values))}"
        return Inspection("", content, class_ids, float(pixels.max()))

    def _read(self, masked_images: Sequence[MaskedImage]) -> list[MaskedSample]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda masked_image: masked_image.load(self.channels, self.downscale), masked_images))

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return an infinite loader of tiles; see `RandomTiles.sample`."""
        return self.train_loader(self.tiles, len(self.tiles))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single validation images."""
        return self.eval_loader(self.val_images, len(self.val_images))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single images of all test sets."""
        return self.eval_loader(self.test_images, len(self.test_images))

    # Batch processing on the device

    def prepare_eval_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Convert images to float32 in [0, 1] and masks to int64, on the device."""
        return {**batch, "image": batch["image"].float() / 255, "mask": batch["mask"].long()}

    def prepare_train_batch(self, batch: dict[str, Any]) -> SegmentationBatch:
        """Convert images to float32 in [0, 1], apply contrast jitter, and convert masks to int64."""
        inputs = batch["image"].float() / 255
        if self.contrast_jitter:
            start = batch["start"]
            noise = uniform(self.seed, "contrast", range(start, start + len(inputs)), 2)
            changes = (self.contrast_jitter * (2 * noise - 1)).astype(np.float32)  # (N, 2)
            gain, shift = to_device_async(changes, inputs.device).T.view(2, -1, 1, 1, 1)
            mean = inputs.mean(dim=(1, 2, 3), keepdim=True)
            inputs = ((inputs - mean) * (1 + gain) + mean + shift).clamp(0, 1)
        prepared: SegmentationBatch = {"image": inputs, "mask": batch["mask"].long()}
        if "weight" in batch:
            prepared["weight"] = batch["weight"]
        return prepared
