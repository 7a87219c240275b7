"""Annotation files in the format of COCO: reading and validation.

T.-Y. Lin et al. Microsoft COCO: Common Objects in Context. ECCV 2014. Format: https://cocodataset.org/#format-data.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from datamodules.errors import UserError
from datamodules.transforms.objects import RunLengthCode

LIMIT = 2**53  # of all numbers in an annotation file, which float64 represents exactly
MAX_CATEGORY = 100_000
MAX_SHIFT = 30  # bits of a count in a compressed run-length code, before its last group
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
    images: dict[int, CocoImage] = {}
    names = set()
    for entry in content["images"]:
        if not _is_image(entry):
            raise InvalidAnnotations(
                f"{path}: the image {_shorten(entry)} has no valid id, file_name, height and width. Add them"
            )
        if entry["id"] in images:
            raise InvalidAnnotations(f"{path}: two images have the id {entry['id']}. Give each its own id")
        if entry["file_name"] in names:
            raise InvalidAnnotations(
                f"{path}: two images have the file_name {_shorten(entry['file_name'])}. Remove one of them"
            )
        names.add(entry["file_name"])
        images[entry["id"]] = CocoImage(entry["id"], entry["file_name"], entry["height"], entry["width"])
    categories = _read_categories(path, content["categories"])
    keypoints, skeleton = _read_keypoints(path, content["categories"])
    if num_keypoints and len(keypoints) != num_keypoints:
        raise InvalidAnnotations(
            f"{path}: its categories have {len(keypoints)} keypoints, but data.num_keypoints is {num_keypoints}. Set it to "
            f"{len(keypoints)}"
        )
    annotations: dict[int, list[dict[str, Any]]] = {}
    problems = []
    for annotation in content["annotations"]:
        if reason := next(_problems(annotation, images, categories, num_keypoints), None):
            name = annotation.get("id", "without id") if isinstance(annotation, dict) else annotation
            problems.append(f"annotation {_shorten(name)}: {reason}")
        else:
            annotations.setdefault(annotation["image_id"], []).append(annotation)
    ordered = sorted(images.values(), key=lambda image: image.id)
    return CocoFile(path, ordered, annotations, problems, categories, keypoints, skeleton)


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


def _is_image(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _is_integer(entry.get("id"))
        and isinstance(entry.get("file_name"), str)
        and all(_is_integer(entry.get(side)) and entry[side] > 0 for side in ("height", "width"))
    )


def _read_categories(path: Path, entries: list[Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in entries:
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if not _is_integer(number) or not 1 <= number <= MAX_CATEGORY or number in names:
            raise InvalidAnnotations(
                f"{path}: the category {_shorten(entry)} has no id of its own from 1 to {MAX_CATEGORY}. Change its id"
            )
        if not isinstance(name, str) or not name:
            raise InvalidAnnotations(f"{path}: the category {_shorten(entry)} has no name. Add one")
        names[number] = name
    if not names:
        raise InvalidAnnotations(f"{path}: there are no categories. Add them")
    return dict(sorted(names.items()))


def _read_keypoints(path: Path, entries: list[Any]) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    entry: dict[str, Any] = next((entry for entry in entries if entry.get("keypoints")), {})
    names, skeleton = entry.get("keypoints") or [], entry.get("skeleton") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidAnnotations(f"{path}: the keypoints of a category are not a list of names. Change them")
    if len({name.lower() for name in names}) < len(names):
        raise InvalidAnnotations(f"{path}: two keypoints have the same name. Rename one of them")
    valid = isinstance(skeleton, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(_is_integer(end) and 1 <= end <= len(names) for end in pair)
        for pair in skeleton
    )
    if not valid:
        raise InvalidAnnotations(f"{path}: the skeleton is not a list of pairs of keypoints 1 ... {len(names)}. Change it")
    return tuple(names), tuple((pair[0] - 1, pair[1] - 1) for pair in skeleton)


def _problems(annotation: Any, images: dict[int, CocoImage], categories: dict[int, str], num_keypoints: int) -> Iterator[str]:
    """Yield the reasons why an annotation cannot be used."""
    if not isinstance(annotation, dict):
        yield "not an object with names and values"
        return
    number, category = annotation.get("image_id"), annotation.get("category_id")
    image = images.get(number) if _is_integer(number) else None
    if image is None:
        yield f"there is no image {_shorten(number)}"
        return
    if not _is_integer(category) or category not in categories:
        yield f"there is no category {_shorten(category)}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield f"iscrowd is {_shorten(annotation['iscrowd'])}, not 0 or 1"
    yield from _box_problems(annotation.get("bbox"), image)
    yield from _mask_problems(annotation.get("segmentation"), image)
    area = annotation.get("area")
    if area is not None and not (_are_numbers([area]) and 0 <= area <= image.height * image.width):
        yield f"the area {_shorten(area)} is not a number of pixels of its image"
    if not _is_integer(annotation.get("num_keypoints", 0)):
        yield f"num_keypoints is {_shorten(annotation['num_keypoints'])}, not a number"
    if num_keypoints:
        yield from _keypoint_problems(annotation.get("keypoints"), num_keypoints, image)


def _box_problems(box: Any, image: CocoImage) -> Iterator[str]:
    if not _are_numbers(box) or len(box) != 4:
        yield f"the box {_shorten(box)} is not [x, y, width, height]"
        return
    x, y, width, height = box
    if min(x, y) < -TOLERANCE or x + width > image.width + TOLERANCE or y + height > image.height + TOLERANCE:
        yield f"the box {box} is not inside of its image of {image.width}x{image.height} pixels"
    left, top, right, bottom = clip_box(box, image.height, image.width)
    if right <= left or bottom <= top:
        yield f"the box {box} is empty"


def clip_box(box: Sequence[float], height: int, width: int) -> np.ndarray:
    """Convert a box [x, y, width, height] to x1, y1, x2, y2 inside of an image: float32 (4,)."""
    ends = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    return np.clip(np.array(ends), 0, [width, height, width, height]).astype(np.float32)


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
        if max(max(polygon[::2]) - image.width, max(polygon[1::2]) - image.height, -min(polygon)) > TOLERANCE:
            yield f"a polygon is not inside of its image of {image.width}x{image.height} pixels"
            return
    sides = [max(polygon[i::2]) - min(polygon[i::2]) for polygon in mask for i in (0, 1)]
    if min(sides) < 2 and not coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(mask, image.height, image.width))):
        yield "its polygons have no pixel"


def _code_problems(code: dict[str, Any], image: CocoImage) -> Iterator[str]:
    size, counts = code.get("size"), code.get("counts")
    if not isinstance(size, list) or not all(map(_is_integer, size)) or size != [image.height, image.width]:
        yield f"the run-length code has the size {_shorten(size)}, but its image [{image.height}, {image.width}]"
        return
    try:
        runs: Any = decompress_counts(counts) if isinstance(counts, str) else counts
    except ValueError:
        runs = None
    valid = isinstance(runs, list) and all(_is_integer(run) and run >= 0 for run in runs)
    if not valid or sum(runs) != image.height * image.width:
        yield f"the counts of the run-length code do not add up to the {image.height * image.width} pixels of its image"
    elif not sum(runs[1::2]):
        yield "its run-length code has no pixel"


def _keypoint_problems(points: Any, num_keypoints: int, image: CocoImage) -> Iterator[str]:
    if not _are_numbers(points) or len(points) != 3 * num_keypoints:
        found = len(points) if isinstance(points, list) else "no"
        yield f"{found} numbers for {num_keypoints} keypoints, not {3 * num_keypoints}"
        return
    for x, y, visibility in zip(points[::3], points[1::3], points[2::3], strict=True):
        if visibility not in (0, 1, 2):
            yield f"the visibility of a keypoint is {visibility}, not 0, 1 or 2"
            return
        inside = -TOLERANCE <= x <= image.width + TOLERANCE and -TOLERANCE <= y <= image.height + TOLERANCE
        if visibility and not inside:
            yield f"the keypoint [{x}, {y}] is not inside of its image of {image.width}x{image.height} pixels"
            return


def decompress_counts(text: str) -> list[int]:
    """Decode the compressed counts of a run-length code: groups of five bits, and differences from the last but one count.

    Raises:
        ValueError: the text contains other characters, or ends within a count.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > MAX_SHIFT:
            raise ValueError("not a run-length code")
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:  # the last group of a count
            value -= (1 << shift) if group & 0x10 else 0
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value, shift = 0, 0
    if shift:
        raise ValueError("incomplete run-length code")
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


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LIMIT


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and -LIMIT < value < LIMIT for value in values
    )


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def mirrored_keypoints(names: Sequence[str]) -> list[int]:
    """Return the index of the keypoint that each keypoint becomes in a flipped image: "left_eye" becomes "right_eye"."""
    lower = [name.lower() for name in names]
    index = {name: i for i, name in enumerate(lower)}
    swapped = [
        name.replace("left", "right") if "left" in name else name.replace("right", "left") if "right" in name else name
        for name in lower
    ]
    return [index.get(name, i) for i, name in enumerate(swapped)]
