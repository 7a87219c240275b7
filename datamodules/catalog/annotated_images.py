"""Images with annotated objects: from COCO files, label maps of instances, and folders of masks."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.catalog.catalog import DatasetNotFound, catalog, get_dataset, is_folder
from datamodules.catalog.coco_annotations import CocoFile, annotation_mask, clip_box, mirrored_keypoints, read_coco_file
from datamodules.catalog.digit_scenes import SCENE_CLASSES, digit_scene, scene_names
from datamodules.catalog.masked_image import MaskedImage
from datamodules.catalog.masked_images import add_unique, list_masked_images
from datamodules.errors import UserError
from datamodules.io.folders import list_images
from datamodules.io.image_io import InvalidImage, open_image, pixel_hash, probe_image, read_image, to_channels
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs
from datamodules.transforms.objects import RunLengthCode, encode_masks, label_map_codes, mask_areas, mask_boxes

MAX_IDS = 20_000  # objects in a label map


class Annotations(NamedTuple):
    """The objects of an image, as in its file."""

    boxes: np.ndarray  # float32 (M, 4): x1, y1, x2, y2 in pixels
    labels: np.ndarray  # int64 (M,), from 1 on
    masks: list[RunLengthCode]  # M masks
    areas: np.ndarray  # float64 (M,), in pixels, as annotated
    crowd: np.ndarray  # bool (M,): regions with an unknown number of objects
    keypoints: np.ndarray  # float32 (M, K, 3): x, y and visibility


def annotations_of_masks(masks: list[RunLengthCode], labels: Sequence[int], crowd: Sequence[bool]) -> Annotations:
    """Return the annotations of objects with masks only."""
    no_keypoints = np.zeros((len(masks), 0, 3), np.float32)
    return Annotations(
        mask_boxes(masks), np.array(labels, np.int64), masks, mask_areas(masks), np.array(crowd, bool), no_keypoints
    )


def check_mask_size(path: Path, values: np.ndarray, height: int, width: int) -> None:
    """Require that a mask is gray and has the size of its image.

    Raises:
        InvalidImage: it has another shape.
    """
    if values.shape != (height, width):
        found = "x".join(map(str, values.shape[::-1]))
        raise InvalidImage(f"{path}: {found}, but its image has {width}x{height} pixels. Save gray masks of this size")


class ImageSummary(NamedTuple):
    """Result of the validation of an image and its annotations."""

    height: int
    width: int
    content_hash: str
    n_objects: int  # without crowds
    n_keypoints: int  # that are annotated


@dataclass(frozen=True)
class AnnotatedImage(ABC):
    """An image with objects."""

    image: ImageRef

    def inspect(self, decode: bool) -> ImageSummary:
        """Check the image and its annotations.

        Args:
            decode: decode the image. Otherwise only its header and its end are read, see `probe_image`.

        Raises:
            InvalidImage: the image or its masks are unusable.
        """
        if decode:
            pixels = self.read()
            (height, width), content = pixels.shape[-2:], pixel_hash(pixels)
        else:
            content = probe_image(self.image.path, 1)
            width, height = (int(length) for length in content.split()[0].split("x"))
        digest, n_objects, n_keypoints = self.describe_annotations(height, width)
        return ImageSummary(height, width, f"{content} {digest}", n_objects, n_keypoints)

    def describe_annotations(self, height: int, width: int) -> tuple[str, int, int]:
        """Return a hash of the annotations, the number of objects without crowds, and the number of annotated keypoints."""
        annotations = self.annotations(height, width)
        digest = hashlib.sha256()
        for values in (annotations.boxes, annotations.labels, annotations.crowd, annotations.keypoints):
            digest.update(values.tobytes())
        for code in annotations.masks:
            digest.update(code["counts"])
        n_keypoints = int((annotations.keypoints[..., 2] > 0).sum())
        return digest.hexdigest(), int((~annotations.crowd).sum()), n_keypoints

    def read(self) -> Tensor:
        """Read the image: uint8 (3, H, W).

        Raises:
            InvalidImage: it is unusable.
        """
        return to_channels(read_image(self.image.path), 3)

    @abstractmethod
    def annotations(self, height: int, width: int) -> Annotations:
        """Return the objects of the image, which has this size.

        Raises:
            InvalidImage: the masks are unusable, or have another size.
        """


@dataclass(frozen=True)
class CocoAnnotatedImage(AnnotatedImage):
    """An image of a COCO file.

    Args:
        size: height and width in the file.
        entries: its annotations.
        labels: label by category id.
        num_keypoints: number of keypoints of an object.
    """

    size: tuple[int, int]
    entries: Sequence[dict[str, Any]]
    labels: dict[int, int]
    num_keypoints: int

    def check_size(self, height: int, width: int) -> None:
        """Check the size of the image file.

        Raises:
            InvalidImage: it differs from that in the annotation file.
        """
        if (height, width) != self.size:
            raise InvalidImage(
                f"{self.image.path}: {width}x{height} pixels, but {self.size[1]}x{self.size[0]} in the annotation file. "
                "Replace one of them"
            )

    def describe_annotations(self, height: int, width: int) -> tuple[str, int, int]:
        """See `AnnotatedImage`; the masks are not decoded, which takes a minute for all of COCO."""
        self.check_size(height, width)
        digest = hashlib.sha256(json.dumps(list(self.entries), sort_keys=True).encode()).hexdigest()
        n_objects = sum(not entry.get("iscrowd") for entry in self.entries)
        stated = sum(entry.get("num_keypoints", 0) for entry in self.entries)
        n_keypoints = sum(v > 0 for entry in self.entries for v in entry["keypoints"][2::3]) if self.num_keypoints else stated
        return digest, n_objects, n_keypoints

    def annotations(self, height: int, width: int) -> Annotations:
        """See `AnnotatedImage`."""
        self.check_size(height, width)
        masks = [annotation_mask(entry, height, width) for entry in self.entries]
        boxes = [clip_box(entry["bbox"], height, width) for entry in self.entries]
        areas = [entry.get("area") for entry in self.entries]
        own_areas = mask_areas(masks)
        return Annotations(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array([self.labels[entry["category_id"]] for entry in self.entries], np.int64),
            masks,
            np.array([own if area is None else area for area, own in zip(areas, own_areas, strict=True)], np.float64),
            np.array([entry.get("iscrowd", 0) == 1 for entry in self.entries], bool),
            np.array([entry["keypoints"] for entry in self.entries] if self.num_keypoints else [], np.float32).reshape(
                len(masks), self.num_keypoints, 3
            ),
        )


@dataclass(frozen=True)
class LabelMapImage(AnnotatedImage):
    """An image with a map of instance ids, 0 for the background.

    Args:
        masked_image: the image and the map.
        ids_per_class: 0 if all objects have the label 1. Otherwise an id is class value * `ids_per_class` + number, and an id
            below `ids_per_class` is the class value of a group of objects, as in Cityscapes.
        value_map: class value -> label; other values are background.
    """

    masked_image: MaskedImage
    ids_per_class: int = 0
    value_map: dict[int, int] = field(default_factory=dict)

    def read(self) -> Tensor:
        """See `AnnotatedImage`."""
        return self.masked_image.read(3)[0]

    def annotations(self, height: int, width: int) -> Annotations:
        """See `AnnotatedImage`."""
        label_map = self.masked_image.read_mask()
        check_mask_size(self.masked_image.mask, label_map, height, width)
        if (count := len(np.unique(label_map))) > MAX_IDS:
            raise InvalidImage(
                f"{self.masked_image.mask}: {count} different values, not ids of objects. Save one id per object"
            )
        values, masks = label_map_codes(label_map)
        if not self.ids_per_class:
            return annotations_of_masks(masks, [1] * len(values), [False] * len(values))
        is_group = [value < self.ids_per_class for value in values]
        classes = [value if group else value // self.ids_per_class for value, group in zip(values, is_group, strict=True)]
        kept = [i for i, value in enumerate(classes) if value in self.value_map]
        labels = [self.value_map[classes[i]] for i in kept]
        return annotations_of_masks([masks[i] for i in kept], labels, [is_group[i] for i in kept])


@dataclass(frozen=True)
class MaskFolderImage(AnnotatedImage):
    """An image with a folder of binary masks, one for each object; pixels above 0 belong to the object."""

    folder: Path

    def annotations(self, height: int, width: int) -> Annotations:
        """See `AnnotatedImage`."""
        codes = []
        for path in list_images(self.folder):
            if path.parent != self.folder:  # belongs to an image in a folder of this name
                continue
            values = np.asarray(open_image(path))
            check_mask_size(path, values, height, width)
            if not values.any():
                raise InvalidImage(f"{path}: a mask without pixels. Remove it")
            codes += encode_masks(torch.from_numpy(values > 0)[None])
        return annotations_of_masks(codes, [1] * len(codes), [False] * len(codes))


@dataclass(frozen=True)
class DigitSceneImage(AnnotatedImage):
    """A scene composed of digits, see `datamodules/catalog/digit_scenes.py`."""

    subset: str
    number: int

    def inspect(self, decode: bool) -> ImageSummary:
        """See `AnnotatedImage`; a scene has no file."""
        return super().inspect(decode=True)

    def read(self) -> Tensor:
        """See `AnnotatedImage`."""
        return to_channels(digit_scene(self.subset, self.number).pixels, 3)

    def annotations(self, height: int, width: int) -> Annotations:
        """See `AnnotatedImage`."""
        scene = digit_scene(self.subset, self.number)
        return annotations_of_masks(encode_masks(scene.masks), scene.labels, [False] * len(scene.labels))


@dataclass(frozen=True)
class AnnotatedSet:
    """The images of a dataset, and the meaning of their annotations.

    Args:
        images: the images.
        classes: names of the labels 1, 2, ...; empty names are unused labels.
        keypoints: names of the keypoints.
        skeleton: pairs of indices of connected keypoints.
        mirrored: index of the keypoint that each keypoint becomes in a flipped image.
        problems: a line about each annotation that cannot be used.
    """

    images: list[AnnotatedImage]
    classes: tuple[str, ...]
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()
    mirrored: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()


def list_annotated_images(spec: str, num_keypoints: int = 0, category_ids: bool = False, persons: bool = False) -> AnnotatedSet:
    """List the images and objects of a dataset or a folder.

    Args:
        spec: dataset of the catalog, one of its splits ("coco2017/train"), or a folder with the subfolder `images` and one of:
            `annotations.json` in the format of COCO; a subfolder `masks` with a map of instance ids for each image; a subfolder
            `masks` with a folder of binary masks for each image. An image and its map or folder have the same name.
        num_keypoints: number of keypoints of each object; 0 for none.
        category_ids: use the category ids of COCO files as labels. By default, the categories are numbered 1, 2, ... without
            gaps.
        persons: use the annotations of persons of a dataset that has others too; always with keypoints.

    Raises:
        DatasetNotFound: images, masks or annotation files are missing.
        InvalidAnnotations: an annotation file cannot be used.
        UserError: the dataset has no objects or no keypoints.
    """
    entry = None if is_folder(spec) else _entry_of(spec)
    if (
        num_keypoints
        and not (entry and "keypoints" in entry.objects)
        and (entry or not Path(spec, "annotations.json").exists())
    ):
        raise UserError(f"data.num_keypoints: {spec} has no keypoints. Set it to 0")
    if entry is None:
        return _from_folder(Path(spec), num_keypoints, category_ids)
    name, _, split = spec.partition("/")
    if name == "digit-scenes":
        splits = [split] if split else list(entry.splits)
        images: list[AnnotatedImage] = [
            DigitSceneImage(ImageRef(dataset_label(spec), scene, Path()), part, number)
            for part in splits
            for number, scene in enumerate(scene_names(part))
        ]
        return AnnotatedSet(images, SCENE_CLASSES)
    if template := entry.objects.get("keypoints" if num_keypoints or persons else "annotations"):
        if not split:
            raise UserError(f"{spec}: name one of its splits, such as {name}/{next(iter(entry.splits))}")
        path = entry.path / template.replace("{split}", split)
        if not path.exists():
            raise DatasetNotFound(f"{path} is missing. To install: {entry.install_hint()}")
        refs = {ref.path.name: ref for ref in list_image_refs(spec)}
        return _from_coco(read_coco_file(path, num_keypoints), refs, num_keypoints, category_ids)
    return _from_label_maps(spec, entry)


def _entry_of(spec: str) -> Any:
    name = spec.partition("/")[0]
    if name not in catalog():
        list_image_refs(spec)  # raises the error for an unknown name or folder
    entry = get_dataset(name)
    if not entry.objects and not entry.masks.get("instances"):
        known = ", ".join(k for k, v in catalog().items() if v.objects or v.masks.get("instances"))
        raise UserError(f"{name} has no annotated objects. Datasets with objects: {known}")
    return entry


def _from_label_maps(spec: str, entry: Any) -> AnnotatedSet:
    if not entry.objects:
        images = [LabelMapImage(masked.image, masked) for masked in list_masked_images(spec)]
        return AnnotatedSet(list(images), tuple(entry.masks["classes"][1:]))
    maps = list_masked_images(spec, replace=entry.objects["replace"])
    ids_per_class, value_map = entry.objects["ids_per_class"], entry.objects["value_map"]
    labeled = [LabelMapImage(masked.image, masked, ids_per_class, value_map) for masked in maps]
    return AnnotatedSet(list(labeled), tuple(entry.objects["classes"]))


def _from_folder(folder: Path, num_keypoints: int, category_ids: bool) -> AnnotatedSet:
    label, files = dataset_label(str(folder)), list_images(folder / "images")
    if (folder / "annotations.json").exists() or (files and _mask_folders(folder, files[0])):
        names: dict[Path, Path] = {}
        for path in files:
            add_unique(names, path.relative_to(folder / "images").with_suffix(""), path)
        refs = {path: ImageRef(label, name.as_posix(), path) for name, path in names.items()}
        if (folder / "annotations.json").exists():
            content = read_coco_file(folder / "annotations.json", num_keypoints)
            by_name = {path.relative_to(folder / "images").as_posix(): ref for path, ref in refs.items()}
            return _from_coco(content, by_name, num_keypoints, category_ids)
        images: list[AnnotatedImage] = []
        for path, ref in refs.items():
            masks = folder / "masks" / ref.name
            if not masks.is_dir():
                raise DatasetNotFound(f"{path} has no folder of masks {masks}. Create it, empty for an image without objects")
            images.append(MaskFolderImage(ref, masks))
        return AnnotatedSet(images, ("object",))
    masked = list_masked_images(str(folder), instances=True)
    return AnnotatedSet([LabelMapImage(image.image, image) for image in masked], ("object",))


def _mask_folders(folder: Path, first: Path) -> bool:
    """Return whether the folder `masks` has a folder of masks for an image."""
    return (folder / "masks" / first.relative_to(folder / "images").with_suffix("")).is_dir()


def _from_coco(file: CocoFile, refs: dict[str, ImageRef], num_keypoints: int, category_ids: bool) -> AnnotatedSet:
    absent = [image.file_name for image in file.images if image.file_name not in refs]
    if absent:
        raise DatasetNotFound(
            f"{file.path}: {len(absent)} of its {len(file.images)} images are missing, such as {absent[0]}. Add the images, or "
            "remove them from the file"
        )
    if not file.images:
        raise DatasetNotFound(f"{file.path} contains no images. Use another file")
    labels = {category: category if category_ids else i + 1 for i, category in enumerate(file.categories)}
    classes = [""] * max(labels.values())
    for category, name in file.categories.items():
        classes[labels[category] - 1] = name
    images: list[AnnotatedImage] = [
        CocoAnnotatedImage(
            refs[image.file_name], (image.height, image.width), file.annotations.get(image.id, []), labels, num_keypoints
        )
        for image in file.images
    ]
    problems = tuple(f"{file.path}: {problem}" for problem in file.problems)
    mirrored = tuple(mirrored_keypoints(file.keypoints))
    return AnnotatedSet(images, tuple(classes), file.keypoints, file.skeleton, mirrored, problems)
