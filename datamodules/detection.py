"""Detection: images with boxes, masks and keypoints of objects."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader

from datamodules.base import ResumableDataModule
from datamodules.batches import DetectionBatch
from datamodules.catalog.annotated_images import (
    AnnotatedImage,
    AnnotatedSet,
    ImageSummary,
    list_annotated_images,
)
from datamodules.catalog.coco_annotations import InvalidAnnotations
from datamodules.catalog.object_names import declared_classes, declared_skeleton
from datamodules.detection_datasets import EvaluationImages, InMemoryScenes, StreamedScenes
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage
from datamodules.io.image_refs import dataset_label
from datamodules.transforms.augment_objects import ObjectAugment

SHOWN_PROBLEMS = 5  # in a message


class Detection(ResumableDataModule):
    """Images with objects.

    Yields `DetectionBatch` and `DetectionEvalBatch`, see `datamodules/batches.py`. Evaluation images have their full size.

    Args:
        train: training images: a dataset of the catalog ("coco2017/train"), or a folder, see `list_annotated_images`.
        val: validation images.
        test: datasets to evaluate; absent ones are reported and skipped.
        num_classes: number of classes and of the background, as in torchvision.
        num_keypoints: number of keypoints of an object; 0 for none.
        persons: use the annotations of persons of COCO only, which contain keypoints; always with keypoints.
        category_ids: use the category ids of COCO as labels (1 ... 90 with gaps), as torchvision's weights require.
        masks: read masks for training.
        short_sides: lengths to which the shorter side of a training image is resized, one of them at random; empty for the
            size of the file.
        long_side: maximum length of the longer side of a training image after it is resized.
        zoom: maximum additional zoom factor of training images; its logarithm is uniform in [-log zoom, log zoom].
        crop: side of a random square of the resized training image; null for the whole image.
        hflip: flip half of the training images from left to right.
        symmetries: use the eight symmetries of the square in training, for images without a preferred direction.
        group_by_shape: batches contain only wide or only tall images, which reduces padding.
        skip_empty: leave out training images without objects, and with fewer than `min_keypoints` annotated keypoints.
        min_keypoints: see `skip_empty`.
        max_images: use only the first images with objects of each dataset, to test whether a network can learn them; null for
            all.
        skip_bad: leave out annotations that cannot be used and report them, instead of raising an error.
        batch_size: global batch size, over all devices.
        streaming: decode images on demand instead of keeping them in memory; use with `num_workers`.
        num_workers: loader processes; 0 is fastest for images in memory.
        seed: seed of the order and of the augmentation.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        train: str,
        val: str,
        num_classes: int,
        test: Sequence[str] = (),
        num_keypoints: NonNegativeInt = 0,
        persons: bool = False,
        category_ids: bool = False,
        masks: bool = True,
        short_sides: Sequence[PositiveInt] = (),
        long_side: PositiveInt = 1333,
        zoom: float = 1.0,
        crop: PositiveInt | None = None,
        hflip: bool = True,
        symmetries: bool = False,
        group_by_shape: bool = False,
        skip_empty: bool = False,
        min_keypoints: NonNegativeInt = 0,
        max_images: PositiveInt | None = None,
        skip_bad: bool = False,
        batch_size: int = 2,
        streaming: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, skip_bad)
        self.train, self.val, self.test = train, val, test
        self.num_classes, self.num_keypoints = num_classes, num_keypoints
        self.category_ids, self.persons = category_ids, persons
        self.masks, self.short_sides, self.long_side, self.zoom, self.crop = masks, short_sides, long_side, zoom, crop
        self.hflip, self.symmetries, self.group_by_shape = hflip, symmetries, group_by_shape
        self.skip_empty, self.min_keypoints, self.max_images = skip_empty, min_keypoints, max_images
        self.streaming = streaming
        self.sets: dict[str, AnnotatedSet] = {}
        self.summaries: dict[str, list[ImageSummary]] = {}
        if num_classes < 2:
            raise UserError(f"data.num_classes: {num_classes} is less than 2, the background and one class. Use at least 2")
        if zoom < 1:
            raise UserError(f"data.zoom: {zoom} is less than 1. Use at least 1")
        if short_sides and long_side < max(short_sides):
            raise UserError(f"data.long_side: {long_side} is less than the shorter side {max(short_sides)}. Increase it")

    # Setup

    def setup(self, stage: str) -> None:
        """Locate, read and validate the images and annotations of a stage.

        Raises:
            DatasetNotFound: a dataset is not installed.
            InvalidAnnotations: annotations cannot be used.
            InvalidImage: images or masks are unusable; the message names each of them.
            UserError: no image has objects, the classes of two datasets differ, or two test sets have the same name.
        """
        if stage == "fit":
            images = self._training_images()
            self.augment = ObjectAugment(
                self.short_sides,
                self.long_side,
                self.zoom,
                self.crop,
                self.hflip,
                self.symmetries,
                self.sets[self.train].mirrored,
            )
            scenes = StreamedScenes if self.streaming else InMemoryScenes
            self.train_images = scenes(images, self.masks, self.augment, self.seed)
        if stage in ("fit", "validate"):
            self.val_images = EvaluationImages(self._validate_set(self.val))
        if stage == "test":
            sets = self.read_test_sets(self._validate_set)
            self.test_images = EvaluationImages([image for images in sets for image in images])

    @classmethod
    def list_items(cls, spec: str, init_args: dict[str, Any]) -> Sequence[Any]:
        """List the images with objects."""
        return list_annotated_images(spec, init_args.get("num_keypoints", 0), persons=init_args.get("persons", False)).images

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by label; that of the background, 0, is empty."""
        known = next((found.classes for found in self.sets.values()), ())
        names = ["", *(known or declared_classes(self.train, self.category_ids, self.persons or self.num_keypoints > 0))]
        return names + [f"class {label}" for label in range(len(names), self.num_classes)]

    @property
    def skeleton(self) -> tuple[tuple[int, int], ...]:
        """Pairs of indices of connected keypoints."""
        known = next((found.skeleton for found in self.sets.values()), ())
        return known or (declared_skeleton(self.train) if self.num_keypoints else ())

    def _training_images(self) -> list[AnnotatedImage]:
        images = self._validate_set(self.train)
        summaries = self.summaries[self.train]
        has_objects = [self._has_objects(summary) for summary in summaries]
        if not any(has_objects):
            raise UserError(f"data.train: no image of {self.train} has objects for training. Use another dataset")
        kept = has_objects if self.skip_empty else [True] * len(images)
        self.is_wide = np.array([s.width >= s.height for s, keep in zip(summaries, kept, strict=True) if keep])
        return [image for image, keep in zip(images, kept, strict=True) if keep]

    def _validate_set(self, spec: str) -> list[AnnotatedImage]:
        """Return the images of a dataset after validating them with their annotations, and record their content hashes."""
        listed = list_annotated_images(spec, self.num_keypoints, self.category_ids, self.persons)
        if listed.problems and not self.data_report.skip_bad:
            raise InvalidAnnotations(
                f"{len(listed.problems)} annotations of {spec} cannot be used (--data.skip_bad true leaves them out): "
                f"{shorten(listed.problems)}"
            )
        self.data_report.skipped += listed.problems
        if len(listed.classes) >= self.num_classes:
            raise UserError(
                f"data.num_classes: {self.num_classes}, but {spec} has {len(listed.classes)} classes and a background. "
                f"Set data.num_classes and model.num_classes to {len(listed.classes) + 1}"
            )
        for other, known in self.sets.items():
            if (known.classes, known.keypoints) != (listed.classes, listed.keypoints):
                raise UserError(f"data: {spec} has other classes or keypoints than {other}. Use datasets with the same ones")
        self.sets[spec] = listed
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(partial(inspect, decode=not self.streaming), listed.images))
        if reasons := [reason for reason in results if isinstance(reason, str)]:
            raise InvalidImage(
                f"{len(reasons)} of {len(results)} images of {spec} cannot be used. Replace or remove them: {shorten(reasons)}"
            )
        pairs = [
            (image, summary) for image, summary in zip(listed.images, results, strict=True) if not isinstance(summary, str)
        ]
        if self.max_images is not None:
            pairs = [pair for pair in pairs if self._has_objects(pair[1])][: self.max_images]
        self.summaries[spec] = [summary for _, summary in pairs]
        hashes = {image.image.name: summary.content_hash for image, summary in pairs}
        self.data_report.content_hashes[dataset_label(spec)] = hashes
        return [image for image, _ in pairs]

    def _has_objects(self, summary: ImageSummary) -> bool:
        """Return whether an image has objects for training, with enough keypoints."""
        return summary.n_objects > 0 and summary.n_keypoints >= self.min_keypoints

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return an infinite loader of augmented images with objects."""
        return self.train_loader(self.train_images, len(self.train_images), self.is_wide if self.group_by_shape else None)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single validation images."""
        return self.eval_loader(self.val_images, len(self.val_images))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single images of all test sets."""
        return self.eval_loader(self.test_images, len(self.test_images))

    # Batch processing on the device

    def prepare_train_batch(self, batch: dict[str, Any]) -> DetectionBatch:
        """Convert images to float32 in [0, 1]."""
        return {"image": [image.float() / 255 for image in batch["image"]], "objects": batch["objects"]}

    def prepare_eval_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Convert images to float32 in [0, 1]."""
        return {**batch, "image": [image.float() / 255 for image in batch["image"]]}


def shorten(problems: Sequence[str]) -> str:
    """Join the first problems, and count the others."""
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return "; ".join(problems[:SHOWN_PROBLEMS]) + more


def inspect(image: AnnotatedImage, decode: bool) -> ImageSummary | str:
    """Return the result of `AnnotatedImage.inspect`, or the reason why the image cannot be used."""
    try:
        return image.inspect(decode)
    except InvalidImage as error:
        return str(error)
