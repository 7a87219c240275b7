"""Generation: training images, indices of samples to generate, and real reference images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.batches import GenerationBatch
from datamodules.catalog.catalog import DatasetNotFound
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs
from datamodules.io.image_set import ImageSet, center_crop_resize, folder_labels, load_image_set
from datamodules.random.philox import randint_from_words, random_words
from datamodules.sampler import InfiniteBatchSampler

EVAL_BATCH = 100  # samples per evaluation batch


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
        crop: side of the center crop of image files before resizing, in pixels; None for the largest square.
        hflip: flip training images left to right with probability 0.5.
        batch_size: global batch size, over all devices.
        streaming: decode images on demand instead of keeping them in memory; use with `num_workers`.
        num_workers: loader processes; 0 is fastest for images in memory.
        skip_bad: skip unusable files and report their count instead of raising an error.
        seed: seed of the order and the flips.
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
                self.items: InMemoryImages | StreamedImages = StreamedImages(refs, self.size, self.channels, self.crop)
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
        image_sets = {}
        for spec in self.test:
            try:
                image_sets[dataset_label(spec)] = self._read(spec)
            except DatasetNotFound as error:
                self.missing_sets.append(f"{spec}: {error}")
        if not image_sets:
            raise DatasetNotFound("; ".join(self.missing_sets) or "data.test: no dataset given. Name at least one")
        return image_sets

    def preview_images(self, count: int) -> Tensor:
        """Return the first training images in training order: (count, channels, size, size) in [0, 1]."""
        order = InfiniteBatchSampler(len(self.items), count, self.seed, lambda: 0)
        _, items = next(iter(order))
        return self.items[0, items]["image"].float() / 255

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return an infinite loader of uint8 images; `on_after_batch_transfer` converts them to float."""
        if self.num_workers and isinstance(self.items, InMemoryImages):
            self.items.images.pixels.share_memory_()
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
            flip_mask = torch.from_numpy(randint_from_words(words, 2) == 1).to(image.device)
            image = torch.where(flip_mask[:, None, None, None], image.flip(3), image)
        return {"image": image, "label": batch["label"]}


class InMemoryImages(Dataset[dict[str, Any]]):
    """Batches of decoded images, indexed by the outputs of `InfiniteBatchSampler`."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Return {"image": uint8 (B, C, size, size), "label": int64 (B,), "start": position of the first sample}."""
        start, items = slice_
        selection = torch.from_numpy(items)
        return {"image": self.images.pixels[selection], "label": self.images.labels[selection], "start": start}


class StreamedImages(Dataset[dict[str, Any]]):
    """Batches of images that are decoded on demand, for datasets larger than memory."""

    def __init__(self, refs: Sequence[ImageRef], size: int, channels: int, crop: int | None) -> None:
        self.files = [ref.path for ref in refs]
        self.labels = folder_labels(refs)
        self.size, self.channels, self.crop = size, channels, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Return {"image": uint8 (B, C, size, size), "label": int64 (B,), "start": position of the first sample}."""
        start, items = slice_
        crops = [center_crop_resize(self.files[item], self.size, self.channels, self.crop) for item in items]
        return {"image": torch.stack(crops), "label": self.labels[torch.from_numpy(items)], "start": start}


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
