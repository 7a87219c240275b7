"""Generation: images to imitate, numbers of samples to make, and real images to measure these against."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.catalog.catalog import DatasetNotFound
from datamodules.errors import UserError
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs
from datamodules.io.image_set import ImageSet, center_crop_resize, folder_labels, load_image_set
from datamodules.random.philox import randint_from_words, random_words
from datamodules.sampler import InfiniteBatchSampler

EVAL_BATCH = 100  # samples made, and real images read, together


class Generation(ResumableDataModule):
    """Images of one size, to be imitated.

    Training batches are {"image": (N, channels, size, size) float32 in [0, 1], "label": int64 (N,)}. To measure on there are
    numbers of samples, {"index": int64 (N,)}, and the real images of the sets named by `val` and `test`.

    Args:
        train: what to imitate: a set of the catalogue ("digits"), a split of one ("mnist/train"), or a folder.
        size: side in pixels, see `image_arrays.load_image_set`.
        channels: 1 or 3.
        val: held-out real images: to compare with during training, and to choose what a test's protocol chooses on them.
        test: sets of real images to compare with after it; those that are absent are named and left out.
        val_samples: how many samples a validation makes.
        test_samples: how many a test makes.
        crop: side of the central square that is cut from each picture of a folder first; None for the largest.
        hflip: mirror half of the training images.
        batch_size: global batch, over all devices.
        streaming: read pictures as they are needed instead of keeping them decoded in memory; needs `num_workers`.
        num_workers: loader processes; 0 is fastest where images are kept in memory.
        skip_bad: leave unusable files out (and say how many) instead of refusing to start.
        seed: of the order and the mirroring.
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
        self.streaming = streaming
        self.reference_sets: dict[str, ImageSet] = {}

    # What is where

    def setup(self, stage: str) -> None:
        """Find, read and check the images of a stage.

        Raises:
            MissingData: what is to be imitated or compared with is not here.
            BadImage: files are unusable; the message names each of them.
        """
        if stage == "fit":
            if self.streaming:
                pictures = self.data_report.validate(list_image_refs(self.train), self.crop or self.size, whole=False)
                self.items: InMemoryImages | StreamedImages = StreamedImages(pictures, self.size, self.channels, self.crop)
            else:
                self.items = InMemoryImages(self._read(self.train))
        if self.val:
            self.val_images = self._read(self.val)
            self.reference_sets = {dataset_label(self.val): self.val_images}
        if stage == "test":
            self.reference_sets = self._load_test_sets()

    def _read(self, spec: str) -> ImageSet:
        return load_image_set(spec, self.size, self.channels, self.crop, self.data_report)

    def _load_test_sets(self) -> dict[str, ImageSet]:
        found = {}
        for spec in self.test:
            try:
                found[dataset_label(spec)] = self._read(spec)
            except DatasetNotFound as error:
                self.missing_sets.append(f"{spec}: {error}")
        if not found:
            raise DatasetNotFound("; ".join(self.missing_sets) or "data.test: names no data set")
        return found

    def preview_images(self, count: int) -> Tensor:
        """The first images that training sees: (count, channels, size, size) in [0, 1]."""
        order = InfiniteBatchSampler(len(self.items), count, self.seed, lambda: 0)
        _, items = next(iter(order))
        return self.items[0, items]["image"].float() / 255

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches of uint8 images; `on_after_batch_transfer` makes them float."""
        if self.num_workers and isinstance(self.items, InMemoryImages):
            self.items.images.pixels.share_memory_()
        return self.train_loader(self.items, len(self.items))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The numbers of the samples that a validation makes."""
        return self._numbers(self.val_samples)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The numbers of the samples that a test makes."""
        return self._numbers(self.test_samples)

    def _numbers(self, count: int) -> DataLoader[dict[str, Tensor]]:
        numbers = SampleIndices(count, self.rank_and_world[1])
        return self.eval_loader(numbers, len(numbers))

    # A training batch on its way

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """On the device, make floats in [0, 1] of the bytes, and mirror half of them if so asked."""
        if "image" not in batch:
            return batch
        self.samples_seen += self.batch_size
        return self.prepare_train_batch(batch)

    def prepare_train_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """uint8 images as float32 in [0, 1], mirrored as their positions say."""
        image = batch["image"].float() / 255
        if self.hflip:
            words = random_words(self.seed, "flip", batch["start"], len(image))[:, 0]
            mirrored = torch.from_numpy(randint_from_words(words, 2) == 1).to(image.device)
            image = torch.where(mirrored[:, None, None, None], image.flip(3), image)
        return {"image": image, "label": batch["label"]}


class InMemoryImages(Dataset[dict[str, Any]]):
    """Batches of decoded images, by what `InfiniteBatchSampler` yields: the first sample's position, and the items."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """{"image": uint8 (B, C, size, size), "label": int64 (B,), "start": position of the first}."""
        start, items = slice_
        chosen = torch.from_numpy(items)
        return {"image": self.images.pixels[chosen], "label": self.images.labels[chosen], "start": start}


class StreamedImages(Dataset[dict[str, Any]]):
    """The same batches for sets that do not fit into memory: a picture is read when its turn comes."""

    def __init__(self, pictures: Sequence[ImageRef], size: int, channels: int, crop: int | None) -> None:
        self.files = [picture.path for picture in pictures]
        self.labels = folder_labels(pictures)
        self.size, self.channels, self.crop = size, channels, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """{"image": uint8 (B, C, size, size), "label": int64 (B,), "start": position of the first}."""
        start, items = slice_
        squares = [center_crop_resize(self.files[item], self.size, self.channels, self.crop) for item in items]
        return {"image": torch.stack(squares), "label": self.labels[torch.from_numpy(items)], "start": start}


class SampleIndices(Dataset[dict[str, Tensor]]):
    """The numbers 0 ... count - 1, some at once, so that each of several processes gets some.

    Raises:
        Refused: there are more processes than numbers.
    """

    def __init__(self, count: int, world: int = 1) -> None:
        if count < world:
            raise UserError(f"samples: {count} cannot be made by {world} processes; take at least {world}")
        self.count, self.at_once = count, min(EVAL_BATCH, count // world)

    def __len__(self) -> int:
        return -(-self.count // self.at_once)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """{"index": int64 (B,)}."""
        if index >= len(self):
            raise IndexError(index)
        return {"index": torch.arange(index * self.at_once, min(self.count, (index + 1) * self.at_once))}
