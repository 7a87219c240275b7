"""Datasets of the detection datamodule: batches of augmented images with objects, and full evaluation images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.catalog.annotated_images import AnnotatedImage, Annotations
from datamodules.random.noise import uniform
from datamodules.transforms.augment_objects import ObjectAugment
from datamodules.transforms.mask_buffer import MaskBuffer
from datamodules.transforms.objects import Objects
from datamodules.transforms.to_device import to_device_async
from datamodules.transforms.window import Window, crop_boxes, crop_keypoints, move_boxes, move_image, move_keypoints


class RandomScenes(Dataset[dict[str, Any]], ABC):
    """Batches of augmented images with objects, indexed by the outputs of `InfiniteBatchSampler`.

    Args:
        images: the images.
        masks: return masks.
        augment: random transforms.
        seed: seed of the transforms.
    """

    def __init__(self, images: Sequence[AnnotatedImage], masks: bool, augment: ObjectAugment, seed: int) -> None:
        self.images, self.masks, self.augment, self.seed = images, masks, augment, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Return a `DetectionBatch` before `prepare_train_batch`: images are uint8."""
        start, items = slice_
        noise = uniform(self.seed, "objects", range(start, start + len(items)), 7)
        samples = [self.sample(item, row) for item, row in zip(items.tolist(), noise, strict=True)]
        return {"image": [image for image, _ in samples], "objects": [objects for _, objects in samples]}

    def sample(self, item: int, noise: np.ndarray) -> tuple[Tensor, Objects]:
        """Return an image, uint8 (3, H, W), and its objects, transformed as uniform noise (7,) says.

        Boxes and keypoints are computed on the CPU, because the number of objects in a crop depends on them.
        """
        image, annotations = self.read(item)
        window = self.augment.window(image.shape[-2], image.shape[-1], noise)
        kept = objects_in(annotations, window)
        masks, ids = self.read_masks(item, annotations, kept) if self.masks else (None, kept)
        boxes, labels, keypoints = annotations.boxes[kept], annotations.labels[kept], annotations.keypoints[kept]
        if self.augment.crop is not None:
            boxes, is_cut = crop_boxes(boxes, window)
            if masks is not None:
                boxes[is_cut] = masks.boxes_within(ids[is_cut], window)
            remaining = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
            boxes, labels, ids, keypoints = boxes[remaining], labels[remaining], ids[remaining], keypoints[remaining]
            keypoints = crop_keypoints(keypoints, window)
        values = {"boxes": move_boxes(boxes, window), "labels": labels}
        if keypoints.shape[1]:
            values["keypoints"] = move_keypoints(keypoints, window, self.augment.mirrored_keypoints)
        objects = {name: to_device_async(array, image.device) for name, array in values.items()}
        if masks is not None:
            objects["masks"] = masks.paste(ids, window)
        return move_image(image, window), objects

    @abstractmethod
    def read(self, item: int) -> tuple[Tensor, Annotations]:
        """Return an image, uint8 (3, H, W), and its annotations."""

    @abstractmethod
    def read_masks(self, item: int, annotations: Annotations, kept: np.ndarray) -> tuple[MaskBuffer, np.ndarray]:
        """Return a buffer with the masks of an item, and the indices in it of the objects `kept`."""


class Scene(NamedTuple):
    """A decoded image with its objects."""

    image: Tensor  # uint8 (3, H, W)
    annotations: Annotations
    masks: MaskBuffer  # empty if masks are not used


class InMemoryScenes(RandomScenes):
    """Decoded images and masks; arguments as in `RandomScenes`."""

    def __init__(self, images: Sequence[AnnotatedImage], masks: bool, augment: ObjectAugment, seed: int) -> None:
        super().__init__(images, masks, augment, seed)
        with ThreadPoolExecutor() as pool:
            self.scenes = list(pool.map(partial(read_scene, masks=masks), images))

    @property
    def n_bytes(self) -> int:
        """Size of the images and masks in bytes."""
        return sum(scene.image.nbytes + scene.masks.pixels.nbytes for scene in self.scenes)

    def on_device(self, device: torch.device) -> "InMemoryScenes":
        """Return a copy on a device; see `Storable`. Pixels of resized images may differ by 1."""
        moved = copy(self)
        moved.scenes = [
            Scene(scene.image.to(device), scene.annotations, scene.masks.on_device(device)) for scene in self.scenes
        ]
        return moved

    def read(self, item: int) -> tuple[Tensor, Annotations]:
        """See `RandomScenes`."""
        return self.scenes[item].image, self.scenes[item].annotations

    def read_masks(self, item: int, annotations: Annotations, kept: np.ndarray) -> tuple[MaskBuffer, np.ndarray]:
        """See `RandomScenes`."""
        return self.scenes[item].masks, kept


class StreamedScenes(RandomScenes):
    """Images and masks that are decoded on demand, for datasets larger than memory; arguments as in `RandomScenes`."""

    def read(self, item: int) -> tuple[Tensor, Annotations]:
        """See `RandomScenes`."""
        return read(self.images[item])

    def read_masks(self, item: int, annotations: Annotations, kept: np.ndarray) -> tuple[MaskBuffer, np.ndarray]:
        """See `RandomScenes`."""
        return MaskBuffer([annotations.masks[i] for i in kept]), np.arange(len(kept))


class EvaluationImages(Dataset[dict[str, Any]]):
    """Single evaluation images with annotations."""

    def __init__(self, images: Sequence[AnnotatedImage]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a `DetectionEvalBatch` before `prepare_eval_batch`: images are uint8."""
        ref = self.images[index].image
        image, annotations = read(self.images[index])
        return {
            "image": [image],
            "annotations": [annotations._asdict()],
            "name": [ref.name],
            "dataset": [ref.dataset],
        }


def read(image: AnnotatedImage) -> tuple[Tensor, Annotations]:
    """Read an image, uint8 (3, H, W), and its annotations."""
    pixels = image.read()
    return pixels, image.annotations(pixels.shape[-2], pixels.shape[-1])


def read_scene(image: AnnotatedImage, masks: bool) -> Scene:
    """Read an image, its annotations, and its masks if they are used."""
    pixels, annotations = read(image)
    return Scene(pixels, annotations, MaskBuffer(annotations.masks if masks else []))


def objects_in(annotations: Annotations, window: Window) -> np.ndarray:
    """Return the indices of the objects whose boxes overlap a window, without crowds: int64 (M,)."""
    left, top, right, bottom = annotations.boxes.T
    in_rows = (top < window.top + window.height) & (bottom > window.top)
    in_columns = (left < window.left + window.width) & (right > window.left)
    return np.flatnonzero(in_rows & in_columns & ~annotations.crowd)
