"""Photographs: random crops for training, center crops for evaluation."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.batches import PhotographBatch, PhotographEvalBatch
from datamodules.catalog.array_readers import read_split
from datamodules.catalog.catalog import DatasetNotFound, catalog, get_dataset
from datamodules.errors import UserError
from datamodules.io.decoded_cache import DecodedImages, decode_images
from datamodules.io.image_io import pixel_hash, read_image, to_channels
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs
from datamodules.io.image_set import class_folders, folder_labels
from datamodules.random.philox import randint_from_words, random_words
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.short_side import resize_short_side
from datamodules.transforms.to_device import to_device_async


class PhotographSet(NamedTuple):
    """Resized photographs of a dataset in memory, with their classes."""

    refs: list[ImageRef]
    images: list[Tensor]  # uint8 (3, H, W) each
    labels: Tensor  # int64 (N,)


class Photographs(ResumableDataModule):
    """Photographs, resized so that the shorter side has `resize` pixels, and cropped to squares.

    Yields `PhotographBatch` with random crops, of which half are flipped, and `PhotographEvalBatch` with center crops; see
    `datamodules/batches.py`. The label of an image file is the index of its folder among the folders next to it, as in
    torchvision's `ImageFolder`.

    Args:
        train: training photographs: a dataset of the catalog, one of its splits ("photographs/train"), or a folder.
        val: validation photographs.
        test: datasets to evaluate; absent ones are reported and skipped.
        size: side of a training crop in pixels.
        eval_size: side of an evaluation crop in pixels.
        resize: shorter side of a resized photograph; smaller photographs are enlarged. Images of array datasets, such as
            CIFAR-10, are resized in the same way.
        batch_size: global batch size, over all devices.
        streaming: decode training photographs on demand instead of keeping them in memory; use with `num_workers`.
            Evaluation photographs are in memory.
        num_workers: loader processes; 0 is fastest for images in memory.
        skip_bad: skip unusable files and report their count instead of raising an error. Of streamed photographs, only the
            header and the end are checked.
        seed: seed of the order and of the crops.

    Attributes:
        class_counts: number of classes of each dataset that was read, by its name in logs.

    Raises:
        UserError: `resize` is smaller than a crop, or two datasets have the same name in logs.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: Sequence[str],
        size: int,
        eval_size: int,
        resize: int,
        batch_size: int,
        streaming: bool,
        num_workers: int,
        skip_bad: bool,
        seed: int,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, skip_bad)
        specs: dict[str, str] = {}
        for option, spec in (("train", train), ("val", val), *(("test", spec) for spec in test)):
            if (other := specs.setdefault(dataset_label(spec), spec)) != spec:
                raise UserError(
                    f"data.{option}: {spec} and {other} have the same name in logs and records, {dataset_label(spec)}. "
                    "Rename one of the folders"
                )
        if resize < size:
            raise UserError(f"data.resize: {resize} is smaller than data.size: {size}. Use at least {size}")
        self.train, self.val, self.test = train, val, test
        self.size, self.eval_size, self.resize, self.streaming = size, eval_size, resize, streaming
        self.class_counts: dict[str, int] = {}
        self.class_names_cache: list[str] | None = None

    # Setup

    def setup(self, stage: str) -> None:
        """Locate, read and validate the photographs of a stage.

        Raises:
            DatasetNotFound: a dataset is not installed.
            InvalidImage: files are unusable; the message names each of them.
            UserError: `streaming` is set for a dataset of arrays.
        """
        if stage == "fit":
            self.crops: RandomCrops | StreamedCrops
            if self.streaming and is_array_dataset(self.train):
                raise UserError(f"data.streaming: {self.train} consists of arrays, which are in memory. Set it to false")
            if self.streaming:
                refs = self.data_report.validate(list_image_refs(self.train), 1, decode=False)
                files = [ref.path for ref in refs]
                self.crops = StreamedCrops(files, self.file_labels(refs), self.resize, self.size, self.seed)
            else:
                self.crops = RandomCrops(*self.read_training(), self.size, self.seed)
        if stage in ("fit", "validate"):
            self.val_images = CenterCrops([self.read(self.val)], self.eval_size)
        if stage == "test":
            self.test_images = CenterCrops(self.read_test_sets(self.read), self.eval_size)

    def read(self, spec: str) -> PhotographSet:
        """Read and resize the images of a dataset or folder."""
        if is_array_dataset(spec):
            pixels, labels = read_split(spec)
            name = dataset_label(spec)
            self.data_report.add_array(spec, pixels)
            self.class_counts[name] = int(labels.max()) + 1
            refs = [ImageRef(name, f"{index:06d}", Path()) for index in range(len(pixels))]
            return PhotographSet(refs, [resize_short_side(to_channels(image, 3), self.resize) for image in pixels], labels)
        usable, decoded = self._decode(spec)
        return PhotographSet(usable, decoded.images(), self.file_labels(usable))

    def read_training(self) -> tuple[RaggedImageBuffer, Tensor]:
        """Read and resize the training images; return them with their classes, int64 (N,)."""
        if is_array_dataset(self.train):
            _, images, labels = self.read(self.train)
            return RaggedImageBuffer(images), labels
        usable, decoded = self._decode(self.train, channels_last=True)
        return decoded.buffer(), self.file_labels(usable)

    def _decode(self, spec: str, channels_last: bool = False) -> tuple[list[ImageRef], DecodedImages]:
        """Decode, resize and validate image files; return the usable ones."""
        refs = list_image_refs(spec)

        def read(number: int) -> tuple[Tensor, str]:
            pixels = read_image(refs[number].path)
            resized = resize_short_side(to_channels(pixels, 3), self.resize)
            return resized.permute(1, 2, 0) if channels_last else resized, pixel_hash(pixels)

        settings = f"shorter side of {self.resize} pixels, channels last: {channels_last}"
        decoded = decode_images([ref.file for ref in refs], settings, read)
        return self.data_report.add_results(refs, decoded.results), decoded

    def file_labels(self, refs: Sequence[ImageRef]) -> Tensor:
        """Return the classes of image files of a dataset, int64 (N,), numbered by name as in the training set."""
        folders = class_folders(refs)
        self.class_counts[refs[0].dataset] = len(folders)
        return folder_labels(refs, folders, self._training_class_names())

    def _training_class_names(self) -> list[str]:
        """Return the class names of the training images; none if they are arrays or not installed."""
        if self.class_names_cache is None:
            try:
                refs = [] if is_array_dataset(self.train) else list_image_refs(self.train)
            except DatasetNotFound:
                refs = []
            self.class_names_cache = [folder.name for folder in class_folders(refs)]
        return self.class_names_cache

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return an infinite loader of random crops."""
        return self.train_loader(self.crops, len(self.crops))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single validation photographs."""
        return self.eval_loader(self.val_images, len(self.val_images))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single photographs of all test sets."""
        return self.eval_loader(self.test_images, len(self.test_images))

    # Batch processing on the device

    def prepare_train_batch(self, batch: dict[str, Any]) -> PhotographBatch:
        """Convert uint8 images to float32 in [0, 1]."""
        return {"image": batch["image"].float() / 255}

    def prepare_eval_batch(self, batch: dict[str, Any]) -> PhotographEvalBatch:
        """Convert uint8 images to float32 in [0, 1]."""
        return {
            "image": batch["image"].float() / 255,
            "label": batch["label"],
            "index": batch["index"],
            "name": batch["name"],
            "dataset": batch["dataset"],
        }


class RandomCrops(Dataset[dict[str, Any]]):
    """Batches of random crops of photographs, half of them flipped, indexed by the outputs of `InfiniteBatchSampler`.

    Args:
        images: uint8 images of 3 channels.
        labels: their classes, int64 (N,).
        size: side of the crops in pixels.
        seed: seed of the positions.
    """

    def __init__(self, images: RaggedImageBuffer, labels: Tensor, size: int, seed: int) -> None:
        self.images, self.labels, self.size, self.seed = images, labels, size, seed

    def __len__(self) -> int:
        return len(self.images)

    @property
    def n_bytes(self) -> int:
        """Size of the photographs in bytes."""
        return self.images.pixels.nbytes

    def on_device(self, device: torch.device) -> "RandomCrops":
        """Return a copy on a device; see `Storable`."""
        moved = copy(self)
        moved.images, moved.labels = self.images.on_device(device), self.labels.to(device)
        return moved

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Return {"image": uint8 (B, 3, size, size), "label": int64 (B,)}."""
        start, items = slice_
        labels = self.labels[to_device_async(items, self.labels.device)]
        return {"image": crop_at_random(self.images, items, start, self.size, self.seed), "label": labels}


class StreamedCrops(Dataset[dict[str, Any]]):
    """The crops of `RandomCrops`, of photographs that are decoded on demand, for datasets larger than memory.

    Args:
        files: image files.
        labels: their classes, int64 (N,).
        resize: shorter side of a resized photograph in pixels.
        size: side of the crops in pixels.
        seed: seed of the positions.
    """

    def __init__(self, files: Sequence[Path], labels: Tensor, resize: int, size: int, seed: int) -> None:
        self.files, self.labels, self.resize, self.size, self.seed = files, labels, resize, size, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Return {"image": uint8 (B, 3, size, size), "label": int64 (B,)}."""
        start, items = slice_
        images = RaggedImageBuffer([read_resized(self.files[item], self.resize) for item in items])
        crops = crop_at_random(images, np.arange(len(items)), start, self.size, self.seed)
        return {"image": crops, "label": self.labels[items]}


def crop_at_random(images: RaggedImageBuffer, image_ids: np.ndarray, start: int, size: int, seed: int) -> Tensor:
    """Crop the images `image_ids` (B,) for the samples from position `start` on; half of the crops are flipped.

    Returns:
        uint8 (B, 3, size, size).
    """
    words = random_words(seed, "crop", start, len(image_ids))
    positions = np.stack([images.heights[image_ids], images.widths[image_ids]], axis=1) - size + 1
    corners = randint_from_words(words[:, :2], positions)
    flips = 2 * randint_from_words(words[:, 2], 2)
    return images.crop_patches(image_ids, corners[:, 0], corners[:, 1], size, flips)


class CenterCrops(Dataset[dict[str, Any]]):
    """Center crops of photographs.

    Args:
        sets: photographs of one or more datasets.
        size: side of the crops in pixels.
    """

    def __init__(self, sets: Sequence[PhotographSet], size: int) -> None:
        self.refs = [ref for photographs in sets for ref in photographs.refs]
        self.images = [image for photographs in sets for image in photographs.images]
        self.labels = torch.cat([photographs.labels for photographs in sets])
        self.size = size

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"image": uint8 (1, 3, size, size), "label" and "index": int64 (1,), "name", "dataset"}."""
        image, ref = self.images[index], self.refs[index]
        return {
            "image": center_crop(image, self.size)[None],
            "label": self.labels[index : index + 1],
            "index": torch.tensor([index]),
            "name": [ref.name],
            "dataset": [ref.dataset],
        }


def require_multiple(option: str, value: int, divisor: int) -> None:
    """Require that an option of a datamodule is a multiple of a number.

    Raises:
        UserError: it is not; the message names the next multiple.
    """
    if value % divisor:
        raise UserError(f"data.{option}: {value} is not a multiple of {divisor}. Use {value + -value % divisor}")


def is_array_dataset(spec: str) -> bool:
    """Return whether a dataset of the catalog consists of arrays, such as CIFAR-10, and not of image files."""
    name = spec.partition("/")[0]
    return name in catalog() and bool(get_dataset(name).arrays)


def center_crop(image: Tensor, size: int) -> Tensor:
    """Return the central square of an image: (3, H, W) to (3, size, size)."""
    top, left = ((length - size) // 2 for length in image.shape[-2:])
    return image[:, top : top + size, left : left + size]


def read_resized(path: Path, length: int) -> Tensor:
    """Read an RGB image, and resize its shorter side, see `resize_short_side`."""
    return resize_short_side(to_channels(read_image(path), 3), length)
