"""Segmentation: augmented training tiles and full evaluation images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.batches import SegmentationBatch
from datamodules.catalog.catalog import catalog
from datamodules.catalog.masked_images import MaskedImage, MaskedSample, list_masked_images
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage, pixel_hash
from datamodules.io.image_refs import dataset_label
from datamodules.random.noise import uniform
from datamodules.transforms.augment import SpatialAugment
from datamodules.transforms.downsample import IGNORE_INDEX
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.weight_map import border_weight, class_weights, separate_instances


class Segmentation(ResumableDataModule):
    """Images with a class for each pixel, optionally with instance ids.

    Yields `SegmentationBatch` with masks of side `crop`, and with weights if `border_weight` is given; and
    `SegmentationEvalBatch`, see `datamodules/batches.py`.

    Args:
        train: training images: a dataset of the catalog ("camvid/train"), or a folder with subfolders `images` and `masks`.
        val: validation images.
        test: datasets to evaluate; absent ones are reported and skipped.
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
        train: str,
        val: str,
        num_classes: int,
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
        self.num_classes, self.channels, self.instances = num_classes, channels, instances
        self.crop, self.margin, self.downscale = crop, margin, downscale
        self.augment = SpatialAugment(rotate, hflip, zoom, elastic_std)
        self.contrast_jitter, self.border_weight, self.streaming = contrast_jitter, border_weight, streaming
        self.classes_present: dict[str, set[int]] = {}  # dataset name -> class ids in its masks
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
            masked_images = self._validate_set(self.train)
            if (
                not masked_images[0].mask_spec.instances
                and len(self.classes_present[dataset_label(self.train)] - {IGNORE_INDEX}) < 2
            ):
                raise UserError(
                    f"data.train: the masks of {self.train} have only one class ({IGNORE_INDEX} marks ignored pixels). "
                    "Save objects as 1, or set data.instances"
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
            self.val_images = SegmentationEvalImages(self._validate_set(self.val), self.channels, self.downscale)
        if stage == "test":
            self.test_images = SegmentationEvalImages(self._load_test_sets(), self.channels, self.downscale)

    @classmethod
    def list_items(cls, spec: str, init_args: dict[str, Any]) -> Sequence[Any]:
        """List the images with masks."""
        return list_masked_images(spec)

    @property
    def class_names(self) -> list[str]:
        """Class names by class id."""
        declared = next(
            (names for names in (self._catalog_class_names(spec) for spec in (self.train, self.val, *self.test)) if names), ()
        )
        return [declared[i] if i < len(declared) else f"class {i}" for i in range(self.num_classes)]

    def _catalog_class_names(self, spec: str) -> tuple[str, ...]:
        entry = catalog().get(spec.partition("/")[0])
        return tuple(entry.masks.get("classes", ())) if entry else ()

    def _load_test_sets(self) -> list[MaskedImage]:
        return [image for images in self.read_test_sets(self._validate_set) for image in images]

    def _validate_set(self, spec: str) -> list[MaskedImage]:
        """Return the images of a dataset after validating them with their masks, and record their content hashes."""
        masked_images = list_masked_images(spec, self.instances)
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(self._inspect, masked_images))
        if reasons := [reason for reason, *_ in results if reason]:
            raise InvalidImage(
                f"{len(reasons)} of {len(masked_images)} images of {spec} cannot be used. "
                f"Replace or remove them: {'; '.join(reasons)}"
            )
        self.classes_present[dataset_label(spec)] = {class_id for _, _, class_ids in results for class_id in class_ids}
        for masked_image, (_, content, _) in zip(masked_images, results, strict=True):
            self.data_report.content_hashes.setdefault(masked_image.image.dataset, {})[masked_image.image.name] = content
        return masked_images

    def _inspect(self, masked_image: MaskedImage) -> tuple[str, str, list[int]]:
        """Return the reason why an image is unusable (empty if it is usable), a content hash, and its class ids."""
        try:
            pixels, values = masked_image.read(self.channels)
            if min(values.shape) < self.downscale:
                raise InvalidImage(f"{masked_image.image.path}: too small to be reduced by the factor {self.downscale}")
        except InvalidImage as error:
            return str(error), "", []
        class_ids = np.unique(values > 0 if masked_image.mask_spec.instances else values).astype(int).tolist()
        if unknown := [class_id for class_id in class_ids if class_id != IGNORE_INDEX and class_id >= self.num_classes]:
            known = f"0 ... {self.num_classes - 1}; increase data.num_classes"
            return f"{masked_image.mask}: class {unknown[0]} is not in {known}", "", []
        return "", f"{pixel_hash(pixels)} {pixel_hash(torch.from_numpy(values))}", class_ids

    def _read(self, masked_images: Sequence[MaskedImage]) -> list[MaskedSample]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda masked_image: masked_image.load(self.channels, self.downscale), masked_images))

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return an infinite loader of tiles; see `RandomTiles.sample`."""
        if self.num_workers and isinstance(self.tiles, InMemoryTiles):
            self.tiles.share_memory()
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
            gain, shift = (
                torch.from_numpy(self.contrast_jitter * (2 * noise - 1)).float().to(inputs.device).T.view(2, -1, 1, 1, 1)
            )
            mean = inputs.mean(dim=(1, 2, 3), keepdim=True)
            inputs = ((inputs - mean) * (1 + gain) + mean + shift).clamp(0, 1)
        prepared: SegmentationBatch = {"image": inputs, "mask": batch["mask"].long()}
        if "weight" in batch:
            prepared["weight"] = batch["weight"]
        return prepared


def separate_touching(sample: MaskedSample) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask and the instance ids for training, with a background border between touching objects."""
    if not sample.instances:
        return sample.mask, sample.instance_ids
    instance_ids = separate_instances(sample.instance_ids)
    return (instance_ids > 0).astype(np.uint8), instance_ids


class RandomTiles(Dataset[dict[str, Any]]):
    """Batches of augmented tiles, indexed by the outputs of `InfiniteBatchSampler`.

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
            {"image": uint8 (B, C, crop + margin, crop + margin), "mask": uint8 (B, crop, crop), "start": `start`}, and
            "weight": float32 (B, crop, crop) if `weights` is given.
        """
        samples = range(start, start + len(image_ids))
        heights, widths = images.heights[image_ids], images.widths[image_ids]
        coords = self.augment.sampling_grid(self.seed, samples, heights, widths, self.crop, self.margin)
        half = self.margin // 2
        inner = coords[..., half : half + self.crop, half : half + self.crop]
        inputs = images.sample_bilinear(image_ids, coords).round().to(torch.uint8)
        batch = {"image": inputs, "mask": masks.sample_nearest(image_ids, inner)[:, 0], "start": start}
        if weights is not None:
            batch["weight"] = weights.sample_bilinear(image_ids, inner)[:, 0]
        return batch


class InMemoryTiles(RandomTiles):
    """Tiles of decoded images; in one pass, an H x W image yields round(H W / crop**2) tiles, at least one.

    Args:
        samples: decoded images and masks.
        crop, margin, augment, seed: see `Segmentation`.
        weight: `border_weight` of `Segmentation`.
    """

    def __init__(
        self,
        samples: Sequence[MaskedSample],
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
            class_weight_table = np.append(class_weights(counts[:IGNORE_INDEX]), np.float32(0))
            with ThreadPoolExecutor() as pool:
                border_weights = list(pool.map(lambda ids: border_weight(ids, weight), instance_ids))
            self.weights = RaggedImageBuffer(
                [
                    torch.from_numpy(class_weight_table[mask] + border)[None]
                    for mask, border in zip(masks, border_weights, strict=True)
                ]
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
    """Tiles of images that are decoded on demand, without weights, for datasets larger than memory.

    In one pass, every image yields one tile.
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
        masked_images = [self.files[item].load(self.channels, self.downscale) for item in items]
        images = RaggedImageBuffer([sample.pixels for sample in masked_images])
        masks = RaggedImageBuffer([torch.from_numpy(separate_touching(sample)[0])[None] for sample in masked_images])
        return self.sample(images, masks, None, np.arange(len(items)), start)


class SegmentationEvalImages(Dataset[dict[str, Any]]):
    """Single evaluation images with masks."""

    def __init__(self, eval_images: Sequence[MaskedImage], channels: int, downscale: int) -> None:
        self.eval_images, self.channels, self.downscale = eval_images, channels, downscale

    def __len__(self) -> int:
        return len(self.eval_images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a `SegmentationEvalBatch` before `prepare_eval_batch`: image and mask are uint8."""
        masked_image = self.eval_images[index]
        sample = masked_image.load(self.channels, self.downscale)
        return {
            "image": sample.pixels[None],
            "mask": torch.from_numpy(sample.mask)[None],
            "instance_ids": torch.from_numpy(sample.instance_ids)[None],
            "name": [masked_image.image.name],
            "dataset": [masked_image.image.dataset],
        }
