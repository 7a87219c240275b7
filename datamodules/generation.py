"""Generation: training images, indices of samples to generate, and real reference images."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule, full_size
from datamodules.batches import GenerationBatch
from datamodules.errors import UserError
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs
from datamodules.io.image_set import ImageSet, Square, box_downsample, folder_labels, load_image_set, read_square
from datamodules.random.philox import randint_from_words, random_words
from datamodules.sampler import InfiniteBatchSampler
from datamodules.transforms.to_device import to_device_async

EVAL_BATCH = 100  # samples per evaluation batch
MAX_THUMBNAIL, THUMBNAIL_BYTES = 32, 2**30  # largest side of small images that are kept, and bytes of all with one side


class Generation(ResumableDataModule):
    """Images of one size for generative models.

    Yields `GenerationBatch` and `GenerationEvalBatch`, see `datamodules/batches.py`. The attribute `reference_sets` contains
    the real images of `val` or `test` by dataset name.

    Args:
        train: training images: a dataset of the catalog ("digits"), one of its splits ("mnist/train"), or a folder.
        size: side in pixels, see `load_image_set`.
        channels: 1 or 3.
        val: held-out real images, for validation and for test metrics that select a parameter on held-out images.
        test: datasets of real images for the test; absent ones are reported and skipped.
        val_samples: number of generated samples per validation.
        test_samples: number of generated samples per test.
        crop: side of the square crop of image files before resizing, in pixels; None for the largest square.
        crop_center: horizontal and vertical position of the center of the crop in pixels; None for the center of the image.
        reference_images: number of real images of `val` and of each set of `test` that are read, a random subset; None for all.
        hflip: flip training images left to right with probability 0.5.
        batch_size: global batch size, over all devices.
        streaming: decode images on demand instead of keeping them in memory; use with `num_workers`.
        num_workers: loader processes; 0 is fastest for images in memory.
        skip_bad: skip unusable files and report their count instead of raising an error.
        seed: seed of the order and the flips.

    Raises:
        UserError: `crop_center` without `crop`, or `crop` is less than `size`.
    """

    def __init__(
        self,
        train: str,
        size: int,
        channels: int = 3,
        val: str | None = None,
        test: Sequence[str] = (),
        val_samples: PositiveInt = 100,
        test_samples: PositiveInt = 10_000,
        crop: PositiveInt | None = None,
        crop_center: tuple[PositiveInt, PositiveInt] | None = None,
        reference_images: PositiveInt | None = None,
        hflip: bool = False,
        batch_size: int = 128,
        streaming: bool = False,
        num_workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, skip_bad)
        self.train, self.size, self.channels, self.val, self.test = train, size, channels, val, test
        self.val_samples, self.test_samples, self.crop, self.hflip = val_samples, test_samples, crop, hflip
        if crop_center and not crop:
            raise UserError("data.crop_center: it requires data.crop, the side of the crop. Set it, or remove data.crop_center")
        if crop and crop < size:
            raise UserError(f"data.crop: {crop} is less than data.size: {size}. Use at least {size}")
        self.crop_region, self.reference_images = Square(crop, crop_center), reference_images
        self.streaming = streaming
        self.reference_sets: dict[str, ImageSet] = {}

    # Setup

    def setup(self, stage: str) -> None:
        """Locate, read and validate the images of a stage.

        Raises:
            DatasetNotFound: a dataset is not installed.
            InvalidImage: files are unusable; the message names each of them.
        """
        if stage == "fit":
            if self.streaming:
                refs = self.data_report.validate(list_image_refs(self.train), self.crop or self.size, decode=False)
                self.items: InMemoryImages | StreamedImages = StreamedImages(refs, self.size, self.channels, self.crop_region)
            else:
                self.items = InMemoryImages(self._read(self.train))
        if self.val:
            self.val_images = self._read_reference(self.val)
            self.reference_sets = {dataset_label(self.val): self.val_images}
        if stage == "test":
            self.reference_sets = dict(self.read_test_sets(lambda spec: (dataset_label(spec), self._read_reference(spec))))

    def _read(self, spec: str, max_images: int | None = None) -> ImageSet:
        return load_image_set(spec, self.size, self.channels, self.crop_region, self.data_report, max_images)

    def _read_reference(self, spec: str) -> ImageSet:
        return self._read(spec, self.reference_images) if self.reference_images else self._read(spec)

    def preview_images(self, count: int) -> Tensor:
        """Return the first training images in training order: (count, channels, size, size) in [0, 1]."""
        order = InfiniteBatchSampler(len(self.items), count, self.seed, lambda: 0)
        _, items = next(iter(order))
        return self.items.read(items, self.items.size).float() / 255

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return an infinite loader of uint8 images; `on_after_batch_transfer` converts them to float."""
        self.items.set_image_size(self.image_size_at)
        return self.train_loader(self.items, len(self.items))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return a loader of the indices of validation samples."""
        return self._index_loader(self.val_samples)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return a loader of the indices of test samples."""
        return self._index_loader(self.test_samples)

    def _index_loader(self, count: int) -> DataLoader[dict[str, Tensor]]:
        indices = SampleIndices(count, eval_batch_size(count, self.rank_and_world_size[1]))
        return self.eval_loader(indices, len(indices))

    # Batch processing on the device

    def prepare_train_batch(self, batch: dict[str, Any]) -> GenerationBatch:
        """Convert uint8 images to float32 in [0, 1] and apply random flips."""
        image = batch["image"].float() / 255
        if self.hflip:
            words = random_words(self.seed, "flip", batch["start"], len(image))[:, 0]
            flip_mask = to_device_async(randint_from_words(words, 2) == 1, image.device)
            image = torch.where(flip_mask[:, None, None, None], image.flip(3), image)
        return {"image": image, "label": batch["label"]}


class TrainingImages(Dataset[dict[str, Any]], ABC):
    """Batches of images, indexed by the outputs of `InfiniteBatchSampler`.

    Args:
        size: side of the images in pixels.
        labels: int64 (N,).
    """

    def __init__(self, size: int, labels: Tensor) -> None:
        self.size, self.labels = size, labels
        self.image_size_at: Callable[[int], int | None] = full_size

    def set_image_size(self, image_size_at: Callable[[int], int | None]) -> None:
        """Set the side of the images by position, see `ResumableDataModule.image_size_at`."""
        self.image_size_at = image_size_at

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Return {"image": uint8 (B, C, side, side), "label": int64 (B,), "start": position of the first sample}."""
        start, items = slice_
        side = self.image_size_at(start)
        image = self.read(items, self.size if side is None else side)
        return {"image": image, "label": self.labels[to_device_async(items, self.labels.device)], "start": start}

    @abstractmethod
    def read(self, items: np.ndarray, side: int) -> Tensor:
        """Return images with a side: uint8 (B, C, side, side)."""


class InMemoryImages(TrainingImages):
    """Decoded images."""

    def __init__(self, images: ImageSet) -> None:
        super().__init__(images.pixels.shape[-1], images.labels)
        self.images = images

    @property
    def n_bytes(self) -> int:
        """Size of the images in bytes."""
        return self.images.pixels.nbytes

    def on_device(self, device: torch.device) -> "InMemoryImages":
        """Return a copy on a device; see `Storable`."""
        moved = InMemoryImages(ImageSet(*(tensor.to(device) for tensor in self.images)))
        moved.set_image_size(self.image_size_at)
        return moved

    def read(self, items: np.ndarray, side: int) -> Tensor:
        """Return images with a side: uint8 (B, C, side, side)."""
        return box_downsample(self.images.pixels[to_device_async(items, self.images.pixels.device)], side)


class StreamedImages(TrainingImages):
    """Images that are decoded on demand, for datasets larger than memory.

    If the training starts with small images, as in progressive growing, each file is decoded once for all sides up to 32
    pixels: the small images are kept in memory that all loader processes share, with at most `THUMBNAIL_BYTES` for each side.

    Args:
        refs: image files.
        size, channels, square: see `read_square`.
    """

    def __init__(self, refs: Sequence[ImageRef], size: int, channels: int, square: Square) -> None:
        super().__init__(size, folder_labels(refs))
        self.files = [ref.path for ref in refs]
        self.channels, self.crop_region = channels, square
        self.thumbnails: dict[int, Tensor] = {}  # side: uint8 (N, C, side, side)
        read_square(self.files[0], size, channels, square)  # raises an error for unusable settings

    def set_image_size(self, image_size_at: Callable[[int], int | None]) -> None:
        """Set the side of the images by position, and allocate the memory for small images."""
        super().set_image_size(image_size_at)
        side = image_size_at(0) or self.size
        while side < min(self.size, MAX_THUMBNAIL + 1) and len(self) * self.channels * side**2 <= THUMBNAIL_BYTES:
            self.thumbnails[side] = shared_zeros(len(self), self.channels, side, side)
            side *= 2
        self.is_stored = shared_zeros(len(self))

    def read(self, items: np.ndarray, side: int) -> Tensor:
        """Return images with a side: uint8 (B, C, side, side)."""
        return torch.stack([self._read_item(int(item), side) for item in items])

    def _read_item(self, item: int, side: int) -> Tensor:
        if side in self.thumbnails and self.is_stored[item]:
            return self.thumbnails[side][item]
        pixels = read_square(self.files[item], self.size, self.channels, self.crop_region)[None]
        if side in self.thumbnails:
            for small_side, images in self.thumbnails.items():
                images[item] = box_downsample(pixels, small_side)[0]
            self.is_stored[item] = 1  # last: another process may read the images from now on
        return box_downsample(pixels, side)[0]


def shared_zeros(*shape: int) -> Tensor:
    """Return uint8 zeros in memory that forked processes share."""
    return torch.frombuffer(mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)


def eval_batch_size(count: int, world_size: int) -> int:
    """Return the size of evaluation batches: at most `EVAL_BATCH`, and at most `count / world_size` rounded up."""
    return min(EVAL_BATCH, -(-count // world_size))


class SampleIndices(Dataset[dict[str, Tensor]]):
    """Indices 0 ... count - 1 in batches of at most `batch_size`."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return {"index": int64 (B,)}.

        Raises:
            IndexError: `index` is not below the number of batches.
        """
        if index >= len(self):
            raise IndexError(index)
        return {"index": torch.arange(index * self.batch_size, min(self.count, (index + 1) * self.batch_size))}
