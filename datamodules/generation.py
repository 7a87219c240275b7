"""Generation: images to imitate, numbers of samples to make, and real images to measure these against."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import Stream
from datamodules.catalog.catalog import MissingData
from datamodules.errors import Refused
from datamodules.io.image_refs import Picture, pictures_of, slug
from datamodules.io.image_set import Images, folder_labels, read_images, square
from datamodules.random.philox import below, draws
from datamodules.sampler import EndlessBatches

AT_ONCE = 100  # samples made, and real images read, together


class Generation(Stream):
    """Images of one size, to be imitated.

    Training batches are {"image": (N, channels, size, size) float32 in [0, 1], "label": int64 (N,)}. To measure on there are
    numbers of samples, {"index": int64 (N,)}, and the real images of the sets named by `val` and `test`.

    Args:
        train: what to imitate: a set of the catalogue ("digits"), a split of one ("mnist/train"), or a folder.
        size: side in pixels, see `image_arrays.read_images`.
        channels: 1 or 3.
        val: held-out real images: to compare with during training, and to choose what a test's protocol chooses on them.
        test: sets of real images to compare with after it; those that are absent are named and left out.
        samples: how many samples a validation makes.
        test_samples: how many a test makes.
        crop: side of the central square that is cut from each picture of a folder first; None for the largest.
        flip: mirror half of the training images.
        batch_size: global batch, over all devices.
        streaming: read pictures as they are needed instead of keeping them decoded in memory; needs `workers`.
        workers: loader processes; 0 is fastest where images are kept in memory.
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
        samples: PositiveInt = 100,
        test_samples: PositiveInt = 10_000,
        crop: PositiveInt | None = None,
        flip: bool = False,
        batch_size: int = 128,
        streaming: bool = False,
        workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed, skip_bad)
        self.train, self.size, self.channels, self.val, self.test = train, size, channels, val, test
        self.samples, self.test_samples, self.crop, self.flip = samples, test_samples, crop, flip
        self.streaming = streaming
        self.real: dict[str, Images] = {}

    # What is where

    def setup(self, stage: str) -> None:
        """Find, read and check the images of a stage.

        Raises:
            MissingData: what is to be imitated or compared with is not here.
            BadImage: files are unusable; the message names each of them.
        """
        if stage == "fit":
            if self.streaming:
                pictures = self.survey.usable(pictures_of(self.train), self.crop or self.size, whole=False)
                self.items: StoredImages | StreamedImages = StreamedImages(pictures, self.size, self.channels, self.crop)
            else:
                self.items = StoredImages(self._read(self.train))
        if self.val:
            self.held_out = self._read(self.val)
            self.real = {slug(self.val): self.held_out}
        if stage == "test":
            self.real = self._tests()

    def _read(self, spec: str) -> Images:
        return read_images(spec, self.size, self.channels, self.crop, self.survey)

    def _tests(self) -> dict[str, Images]:
        found = {}
        for spec in self.test:
            try:
                found[slug(spec)] = self._read(spec)
            except MissingData as error:
                self.absent.append(f"{spec}: {error}")
        if not found:
            raise MissingData("; ".join(self.absent) or "data.test: names no data set")
        return found

    def examples(self, count: int) -> Tensor:
        """The first images that training sees: (count, channels, size, size) in [0, 1]."""
        order = EndlessBatches(len(self.items), count, self.seed, lambda: 0)
        _, items = next(iter(order))
        return self.items[0, items]["image"].float() / 255

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches of uint8 images; `on_after_batch_transfer` makes them float."""
        if self.workers and isinstance(self.items, StoredImages):
            self.items.images.pixels.share_memory_()
        return self.endless(self.items, len(self.items))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The numbers of the samples that a validation makes."""
        return self._numbers(self.samples)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The numbers of the samples that a test makes."""
        return self._numbers(self.test_samples)

    def _numbers(self, count: int) -> DataLoader[dict[str, Tensor]]:
        numbers = Numbers(count, self.place[1])
        return self.dealt(numbers, len(numbers))

    # A training batch on its way

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """On the device, make floats in [0, 1] of the bytes, and mirror half of them if so asked."""
        if "image" not in batch:
            return batch
        self.position += self.batch_size
        return self.floats(batch)

    def floats(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """uint8 images as float32 in [0, 1], mirrored as their positions say."""
        image = batch["image"].float() / 255
        if self.flip:
            words = draws(self.seed, "flip", batch["start"], len(image))[:, 0]
            mirrored = torch.from_numpy(below(words, 2) == 1).to(image.device)
            image = torch.where(mirrored[:, None, None, None], image.flip(3), image)
        return {"image": image, "label": batch["label"]}


class StoredImages(Dataset[dict[str, Any]]):
    """Batches of decoded images, by what `EndlessBatches` yields: the first sample's position, and the items."""

    def __init__(self, images: Images) -> None:
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

    def __init__(self, pictures: Sequence[Picture], size: int, channels: int, crop: int | None) -> None:
        self.files = [picture.path for picture in pictures]
        self.labels = folder_labels(pictures)
        self.size, self.channels, self.crop = size, channels, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """{"image": uint8 (B, C, size, size), "label": int64 (B,), "start": position of the first}."""
        start, items = slice_
        squares = [square(self.files[item], self.size, self.channels, self.crop) for item in items]
        return {"image": torch.stack(squares), "label": self.labels[torch.from_numpy(items)], "start": start}


class Numbers(Dataset[dict[str, Tensor]]):
    """The numbers 0 ... count - 1, some at once, so that each of several processes gets some.

    Raises:
        Refused: there are more processes than numbers.
    """

    def __init__(self, count: int, world: int = 1) -> None:
        if count < world:
            raise Refused(f"samples: {count} cannot be made by {world} processes; take at least {world}")
        self.count, self.at_once = count, min(AT_ONCE, count // world)

    def __len__(self) -> int:
        return -(-self.count // self.at_once)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """{"index": int64 (B,)}."""
        if index >= len(self):
            raise IndexError(index)
        return {"index": torch.arange(index * self.at_once, min(self.count, (index + 1) * self.at_once))}
