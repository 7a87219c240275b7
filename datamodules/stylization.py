"""Photographs for style transfer: random crops for training, center crops for evaluation."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.batches import StylizationBatch, StylizationEvalBatch
from datamodules.catalog.catalog import DatasetNotFound
from datamodules.errors import UserError
from datamodules.io.image_io import read_image, to_channels
from datamodules.io.image_refs import ImageRef, list_image_refs
from datamodules.random.philox import randint_from_words, random_words
from datamodules.transforms.ragged_buffer import RaggedImageBuffer


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

    # Setup

    def setup(self, stage: str) -> None:
        """Locate, read and validate the photographs of a stage.

        Raises:
            DatasetNotFound: a dataset is not installed.
            InvalidImage: files are unusable; the message names each of them.
        """
        if stage == "fit":
            refs = self.data_report.validate(list_image_refs(self.train), 1)
            self.crops = RandomCrops(self._read(refs), self.size, self.seed)
        if stage in ("fit", "validate"):
            self.val_images = self._read_eval(list_image_refs(self.val))
        if stage == "test":
            self.test_images = self._read_eval(self._test_refs())

    def _test_refs(self) -> list[ImageRef]:
        refs: list[ImageRef] = []
        for spec in self.test:
            try:
                refs += list_image_refs(spec)
            except DatasetNotFound as error:
                self.missing_sets.append(f"{spec}: {error}")
        if not refs:
            raise DatasetNotFound("; ".join(self.missing_sets) or "data.test: no dataset given. Name at least one")
        return refs

    def _read(self, refs: Sequence[ImageRef]) -> list[Tensor]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda ref: resize_short_side(to_channels(read_image(ref.path), 3), self.resize), refs))

    def _read_eval(self, refs: Sequence[ImageRef]) -> "CenterCrops":
        usable = self.data_report.validate(refs, 1)
        return CenterCrops(usable, self._read(usable), self.size)

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return an infinite loader of random crops."""
        if self.num_workers:
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
        words = random_words(self.seed, "crop", start, len(items))
        positions = np.stack([self.images.heights[items], self.images.widths[items]], axis=1) - self.size + 1
        corners = randint_from_words(words[:, :2], positions)
        flips = 2 * randint_from_words(words[:, 2], 2)
        return {"image": self.images.crop_patches(items, corners[:, 0], corners[:, 1], self.size, flips)}


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


def resize_short_side(image: Tensor, length: int) -> Tensor:
    """Resize a uint8 image (C, H, W) by antialiased bilinear interpolation, so that its shorter side has `length` pixels."""
    height, width = image.shape[-2:]
    factor = length / min(height, width)
    size = (max(length, round(height * factor)), max(length, round(width * factor)))
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)
