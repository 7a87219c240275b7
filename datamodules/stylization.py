"""Photographs for style transfer: random crops for training, center crops for evaluation."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.batches import StylizationBatch, StylizationEvalBatch
from datamodules.errors import UserError
from datamodules.io.image_io import read_image, to_channels
from datamodules.io.image_refs import ImageRef, list_image_refs
from datamodules.random.philox import randint_from_words, random_words
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.short_side import resize_short_side


class Stylization(ResumableDataModule):
    """Photographs, resized so that the shorter side has `resize` pixels, and cropped to squares of `size` pixels.

    Yields `StylizationBatch` with random crops, of which half are flipped, and `StylizationEvalBatch` with center crops; see
    `datamodules/batches.py`.

    Args:
        train: training photographs: a dataset of the catalog, one of its splits ("photographs/train"), or a folder.
        val: validation photographs.
        test: datasets to evaluate; absent ones are reported and skipped.
        size: side of a crop in pixels; a multiple of 4.
        resize: shorter side of a resized photograph; smaller photographs are enlarged.
        batch_size: global batch size, over all devices.
        streaming: decode training photographs on demand instead of keeping them in memory; use with `num_workers`.
        num_workers: loader processes; 0 is fastest for images in memory.
        skip_bad: skip unusable files and report their count instead of raising an error.
        seed: seed of the order and of the crops.

    Raises:
        UserError: `size` is not a multiple of 4, or `resize` is smaller.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: Sequence[str] = (),
        size: PositiveInt = 256,
        resize: PositiveInt = 288,
        batch_size: int = 4,
        streaming: bool = False,
        num_workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, skip_bad)
        if size % 4:
            raise UserError(f"data.size: {size} is not a multiple of 4. Use {size + -size % 4}")
        if resize < size:
            raise UserError(f"data.resize: {resize} is smaller than data.size: {size}. Use at least {size}")
        self.train, self.val, self.test, self.size, self.resize = train, val, test, size, resize
        self.streaming = streaming

    # Setup

    def setup(self, stage: str) -> None:
        """Locate, read and validate the photographs of a stage.

        Raises:
            DatasetNotFound: a dataset is not installed.
            InvalidImage: files are unusable; the message names each of them.
        """
        if stage == "fit":
            refs = self.data_report.validate(list_image_refs(self.train), 1, decode=not self.streaming)
            self.crops: RandomCrops | StreamedCrops
            if self.streaming:
                self.crops = StreamedCrops([ref.path for ref in refs], self.resize, self.size, self.seed)
            else:
                self.crops = RandomCrops(self._read(refs), self.size, self.seed)
        if stage in ("fit", "validate"):
            self.val_images = self._read_eval(list_image_refs(self.val))
        if stage == "test":
            self.test_images = self._read_eval(self._test_refs())

    def _test_refs(self) -> list[ImageRef]:
        return [ref for refs in self.read_test_sets(list_image_refs) for ref in refs]

    def _read(self, refs: Sequence[ImageRef]) -> list[Tensor]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda ref: read_resized(ref.path, self.resize), refs))

    def _read_eval(self, refs: Sequence[ImageRef]) -> "CenterCrops":
        usable = self.data_report.validate(refs, 1)
        return CenterCrops(usable, self._read(usable), self.size)

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return an infinite loader of random crops."""
        if self.num_workers and isinstance(self.crops, RandomCrops):
            self.crops.images.share_memory()
        return self.train_loader(self.crops, len(self.crops))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single validation photographs."""
        return self.eval_loader(self.val_images, len(self.val_images))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single photographs of all test sets."""
        return self.eval_loader(self.test_images, len(self.test_images))

    # Batch processing on the device

    def prepare_train_batch(self, batch: dict[str, Any]) -> StylizationBatch:
        """Convert uint8 images to float32 in [0, 1]."""
        return {"image": batch["image"].float() / 255}

    def prepare_eval_batch(self, batch: dict[str, Any]) -> StylizationEvalBatch:
        """Convert uint8 images to float32 in [0, 1]."""
        return {
            "image": batch["image"].float() / 255,
            "index": batch["index"],
            "name": batch["name"],
            "dataset": batch["dataset"],
        }


class RandomCrops(Dataset[dict[str, Any]]):
    """Batches of random crops of photographs, half of them flipped, indexed by the outputs of `InfiniteBatchSampler`.

    Args:
        images: uint8 (3, H, W) each.
        size: side of the crops in pixels.
        seed: seed of the positions.
    """

    def __init__(self, images: Sequence[Tensor], size: int, seed: int) -> None:
        self.images, self.size, self.seed = RaggedImageBuffer(images), size, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Return {"image": uint8 (B, 3, size, size)}."""
        start, items = slice_
        return {"image": crop_at_random(self.images, items, start, self.size, self.seed)}


class StreamedCrops(Dataset[dict[str, Any]]):
    """The crops of `RandomCrops`, of photographs that are decoded on demand, for datasets larger than memory.

    Args:
        files: image files.
        resize: shorter side of a resized photograph in pixels.
        size: side of the crops in pixels.
        seed: seed of the positions.
    """

    def __init__(self, files: Sequence[Path], resize: int, size: int, seed: int) -> None:
        self.files, self.resize, self.size, self.seed = files, resize, size, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Return {"image": uint8 (B, 3, size, size)}."""
        start, items = slice_
        images = RaggedImageBuffer([read_resized(self.files[item], self.resize) for item in items])
        return {"image": crop_at_random(images, np.arange(len(items)), start, self.size, self.seed)}


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
        refs: image files.
        images: their pixels, uint8 (3, H, W) each.
        size: side of the crops in pixels.
    """

    def __init__(self, refs: Sequence[ImageRef], images: Sequence[Tensor], size: int) -> None:
        self.refs, self.images, self.size = refs, images, size

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"image": uint8 (1, 3, size, size), "index": int64 (1,), "name", "dataset"}."""
        image, ref = self.images[index], self.refs[index]
        top, left = ((length - self.size) // 2 for length in image.shape[-2:])
        crop = image[None, :, top : top + self.size, left : left + self.size]
        return {"image": crop, "index": torch.tensor([index]), "name": [ref.name], "dataset": [ref.dataset]}


def read_resized(path: Path, length: int) -> Tensor:
    """Read an RGB image, and resize its shorter side, see `resize_short_side`."""
    return resize_short_side(to_channels(read_image(path), 3), length)
