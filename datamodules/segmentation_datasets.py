"""Training tiles and evaluation images of segmentation, as datasets."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.catalog.masked_image import MaskedImage, MaskedSample
from datamodules.transforms.augment import SpatialAugment
from datamodules.transforms.downsample import IGNORE_INDEX
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.weight_map import border_weight, class_weights, separate_instances


def separate_touching(sample: MaskedSample) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask and the instance ids for training, with a background border between touching objects."""
    if not sample.instances:
        return sample.mask, sample.instance_ids
    instance_ids = separate_instances(sample.instance_ids)
    return (instance_ids > 0).astype(np.uint8), instance_ids


def same_dtype(samples: Sequence[MaskedSample]) -> list[Tensor]:
    """Return the images (C, H, W), as float32 if some keep more than 8 bits."""
    images = [sample.pixels for sample in samples]
    return images if all(image.dtype == torch.uint8 for image in images) else [image.float() for image in images]


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
            {"image": uint8, or float32 in [0, 255], (B, C, crop + margin, crop + margin), "mask": uint8 (B, crop, crop),
            "start": `start`}, and "weight": float32 (B, crop, crop) if `weights` is given.
        """
        samples = range(start, start + len(image_ids))
        heights, widths = images.heights[image_ids], images.widths[image_ids]
        device = images.pixels.device
        coords = self.augment.sampling_grid(self.seed, samples, heights, widths, self.crop, self.margin, device)
        half = self.margin // 2
        inner = coords[..., half : half + self.crop, half : half + self.crop]
        inputs = images.sample_bilinear(image_ids, coords)
        if images.pixels.dtype == torch.uint8:
            inputs = inputs.round().to(torch.uint8)
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
        self.images = RaggedImageBuffer(same_dtype(samples))
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

    @property
    def n_bytes(self) -> int:
        """Size of the images, masks and weights in bytes."""
        return sum(buffer.pixels.nbytes for buffer in (self.images, self.masks, self.weights) if buffer is not None)

    def on_device(self, device: torch.device) -> "InMemoryTiles":
        """Return a copy on a device; see `Storable`. On a GPU, sampling coordinates differ by rounding errors."""
        moved = copy(self)
        moved.images, moved.masks = self.images.on_device(device), self.masks.on_device(device)
        if self.weights is not None:
            moved.weights = self.weights.on_device(device)
        return moved

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
        images = RaggedImageBuffer(same_dtype(masked_images))
        masks = RaggedImageBuffer([torch.from_numpy(separate_touching(sample)[0])[None] for sample in masked_images])
        return self.sample(images, masks, None, np.arange(len(items)), start)


class SegmentationEvalImages(Dataset[dict[str, Any]]):
    """Single evaluation images with masks."""

    def __init__(self, eval_images: Sequence[MaskedImage], channels: int, downscale: int) -> None:
        self.eval_images, self.channels, self.downscale = eval_images, channels, downscale

    def __len__(self) -> int:
        return len(self.eval_images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a `SegmentationEvalBatch` before `prepare_eval_batch`: the mask is uint8, and the image as read."""
        masked_image = self.eval_images[index]
        sample = masked_image.load(self.channels, self.downscale)
        return {
            "image": sample.pixels[None],
            "mask": torch.from_numpy(sample.mask)[None],
            "instance_ids": torch.from_numpy(sample.instance_ids)[None],
            "name": [masked_image.image.name],
            "dataset": [masked_image.image.dataset],
        }
