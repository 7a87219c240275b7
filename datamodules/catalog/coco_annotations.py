"""Annotation files in the format of COCO: reading and validation.

T.-Y. Lin et al. Microsoft COCO: Common Objects in Context. ECCV 2014. Format: https://cocodataset.org/#format-data.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faster_coco_eval.core import mask as coco_mask

from datamodules.errors import UserError
from datamodules.transforms.objects import RunLengthCode

TOLERANCE = 1.0  # pixels by which boxes and polygons may exceed their image, because of rounding


class InvalidAnnotations(UserError):
    """An annotation file cannot be used; the message names the file, the annotation and the reason."""


@dataclass(frozen=True)
class CocoImage:
    """An image of an annotation file."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoFile:
    """The content of an annotation file.

    Args:
        path: the file.
        images: the images, in the order of their ids.
        annotations: valid annotations by the id of their image.
        problems: a line about each annotation that cannot be used.
        categories: names by category id, in the order of the ids.
        keypoints: names of the keypoints.
        skeleton: pairs of indices of connected keypoints.
    """

    path: Path
    images: list[CocoImage]
    annotations: dict[int, list[dict[str, Any]]]
    problems: list[str]
    categories: dict[int, str]
    keypoints: tuple[str, ...]
    skeleton: tuple[tuple[int, int], ...]


def read_coco_file(path: Path, num_keypoints: int) -> CocoFile:
    """Read an annotation file.

    Args:
        path: JSON file with "images", "annotations" and "categories".
        num_keypoints: number of keypoints that the annotations must have; 0 if they are not used.

    Raises:
        InvalidAnnotations: the file is no JSON, or not in the format of COCO.
    """
    content = _read_json(path)
    images = {}
    for entry in content["images"]:
        try:
            image = CocoImage(int(entry["id"]), str(entry["file_name"]), int(entry["height"]), int(entry["width"]))
        except (KeyError, TypeError, ValueError):
            raise InvalidAnnotations(
                f"{path}: the image {_shorten(entry)} has no valid id, file_name, height and width. Add them"
            ) from None
        if image.id in images:
            raise InvalidAnnotations(f"{path}: two images have the id {image.id}. Give each its own id")
        images[image.id] = image
    categories, keypoints, skeleton = _read_categories(path, content["categories"])
    if num_keypoints and len(keypoints) != num_keypoints:
        raise InvalidAnnotations(
            f"{path}: its categories have {len(keypoints)} keypoints, but data.num_keypoints is {num_keypoints}. Set it to "
            f"{len(keypoints)}"
        )
    annotations: dict[int, list[dict[str, Any]]] = {}
    problems = []
    for annotation in content["annotations"]:
        if reason := next(_problems(annotation, images, categories, num_keypoints), None):
            name = annotation.get("id", "without id") if isinstance(annotation, dict) else _shorten(annotation)
            problems.append(f"annotation {name}: {reason}")
        else:
            annotations.setdefault(annotation["image_id"], []).append(annotation)
    return CocoFile(
        path, sorted(images.values(), key=lambda image: image.id), annotations, problems, categories, keypoints, skeleton
    )


def _read_json(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidAnnotations(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidAnnotations(f"{path} is not JSON: {error}. Replace the file") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InvalidAnnotations(f"{path} is not an annotation file of COCO: the list '{key}' is missing. Add it")
    return content


def _read_categories(path: Path, entries: list[Any]) -> tuple[dict[int, str], tuple[str, ...], tuple[tuple[int, int], ...]]:
    try:
        names = {int(entry["id"]): str(entry["name"]) for entry in entries}
        points: dict[str, Any] = next((entry for entry in entries if entry.get("keypoints")), {})
        keypoints = tuple(map(str, points.get("keypoints", ())))
        skeleton = tuple((int(a) - 1, int(b) - 1) for a, b in points.get("skeleton", ()))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InvalidAnnotations(f"{path}: a category has no valid id and name. Add them") from None
    if not names or min(names) < 1 or len(names) < len(entries):
        raise InvalidAnnotations(f"{path}: categories need different ids from 1 on. Change them")
    if any(not 0 <= end < len(keypoints) for pair in skeleton for end in pair):
        raise InvalidAnnotations(f"{path}: the skeleton names keypoints that do not exist. Use 1 ... {len(keypoints)}")
    return dict(sorted(names.items())), keypoints, skeleton


def _problems(annotation: Any, images: dict[int, CocoImage], categories: dict[int, str], num_keypoints: int) -> Iterator[str]:
    """Yield the reasons why an annotation cannot be used."""
    if not isinstance(annotation, dict):
        yield "not an object with names and values"
        return
    image = images.get(annotation.get("image_id", -1)) if isinstance(annotation.get("image_id", -1), int) else None
    if image is None:
        yield f"there is no image {annotation.get('image_id')}"
        return
    if annotation.get("category_id") not in categories:
        yield f"there is no category {annotation.get('category_id')}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield f"iscrowd is {annotation['iscrowd']}, not 0 or 1"
    yield from _box_problems(annotation.get("bbox"), image)
    yield from _mask_problems(annotation.get("segmentation"), image)
    points: Any = annotation.get("keypoints")
    if num_keypoints and (not _are_numbers(points) or len(points) != 3 * num_keypoints):
        found = len(points) if isinstance(points, list) else "no"
        yield f"{found} numbers for {num_keypoints} keypoints, not {3 * num_keypoints}"


def _box_problems(box: Any, image: CocoImage) -> Iterator[str]:
    if not _are_numbers(box) or len(box) != 4:
        yield f"the box {_shorten(box)} is not [x, y, width, height]"
        return
    x, y, width, height = box
    if min(width, height) <= 0:
        yield f"the box {box} is empty"
    if min(x, y) < -TOLERANCE or x + width > image.width + TOLERANCE or y + height > image.height + TOLERANCE:
        yield f"the box {box} is not inside of its image of {image.width}x{image.height} pixels"


def _mask_problems(mask: Any, image: CocoImage) -> Iterator[str]:
    if mask is None or mask == []:
        return
    if isinstance(mask, dict):
        yield from _code_problems(mask, image)
        return
    if not isinstance(mask, list) or not all(_are_numbers(polygon) for polygon in mask):
        yield "the segmentation is neither a list of polygons nor a run-length code"
        return
    for polygon in mask:
        if len(polygon) < 6 or len(polygon) % 2:
            yield f"a polygon has {len(polygon)} coordinates. At least 6, an even number, are needed"
            return
        outside = max(max(polygon[::2]) - image.width, max(polygon[1::2]) - image.height, -min(polygon)) > TOLERANCE
        if outside:
            yield f"a polygon is not inside of its image of {image.width}x{image.height} pixels"
            return


def _code_problems(code: dict[str, Any], image: CocoImage) -> Iterator[str]:
    size, counts = code.get("size"), code.get("counts")
    if size != [image.height, image.width]:
        yield f"the run-length code has the size {size}, but its image [{image.height}, {image.width}]"
        return
    try:
        runs: Any = decompress_counts(counts) if isinstance(counts, str) else counts
        complete = _are_numbers(runs) and min(runs, default=-1) >= 0 and sum(runs) == image.height * image.width
    except IndexError:
        complete = False
    if not complete:
        yield f"the counts of the run-length code do not add up to the {image.height * image.width} pixels of its image"


def decompress_counts(text: str) -> list[int]:
    """Decode the compressed counts of a run-length code: groups of five bits, and differences from the last but one count.

    Raises:
        IndexError: the text ends within a count.
    """
    counts: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            group = ord(text[position]) - 48
            value |= (group & 0x1F) << shift
            more = bool(group & 0x20)
            position, shift = position + 1, shift + 5
            if not more and group & 0x10:
                value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts


def annotation_mask(annotation: dict[str, Any], height: int, width: int) -> RunLengthCode:
    """Return the mask of a valid annotation; that of its box if it has no segmentation."""
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        if isinstance(mask["counts"], list):
            return coco_mask.frPyObjects(mask, height, width)
        return {"size": mask["size"], "counts": mask["counts"].encode()}
    if not mask:
        x, y, box_width, box_height = annotation["bbox"]
        mask = [[x, y, x + box_width, y, x + box_width, y + box_height, x, y + box_height]]
    return coco_mask.merge(coco_mask.frPyObjects(mask, height, width))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def mirrored_keypoints(names: Sequence[str]) -> list[int]:
    """Return the index of the keypoint that each keypoint becomes in a flipped image: "left_eye" becomes "right_eye"."""
    index = {name: i for i, name in enumerate(names)}
    swapped = [
        name.replace("left", "right") if "left" in name else name.replace("right", "left") if "right" in name else name
        for name in names
    ]
    return [index.get(name, i) for i, name in enumerate(swapped)]
