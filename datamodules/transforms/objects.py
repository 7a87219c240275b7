"""Objects of an image: run-length codes of masks, and geometric transforms of images with their objects.

The objects of a training image are a dict of tensors with the names of torchvision: "boxes" (M, 4), float32 x1, y1, x2, y2 in
pixels, where x2 and y2 are the right and lower edges of the last pixel; "labels", int64 (M,), from 1 on; "masks", uint8
(M, H, W), if there are masks; "keypoints", float32 (M, K, 3): x, y, and 2 for visible, 1 for hidden, 0 for absent keypoints.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

RunLengthCode = dict[str, Any]  # "size": [H, W], "counts": bytes, as in COCO's API
Objects = dict[str, Tensor]


def encode_masks(masks: Tensor) -> list[RunLengthCode]:
    """Encode binary masks (M, H, W)."""
    if not len(masks):
        return []
    columns = masks.cpu().to(torch.uint8).permute(1, 2, 0).numpy()
    return list(coco_mask.encode(np.asfortranarray(columns)))


def decode_masks(codes: Sequence[RunLengthCode], height: int, width: int) -> Tensor:
    """Decode masks of one size: uint8 (M, H, W)."""
    if not codes:
        return torch.zeros((0, height, width), dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(list(codes)).transpose(2, 0, 1)))


class CroppedMask(NamedTuple):
    """A binary mask, cropped to its bounding box."""

    top: int
    left: int
    pixels: Tensor  # uint8 (h, w)


def crop_masks(codes: Sequence[RunLengthCode], height: int, width: int) -> list[CroppedMask]:
    """Decode masks of one size, and crop them to their bounding boxes."""
    cropped = []
    for code, box in zip(codes, mask_boxes(codes).astype(int).tolist(), strict=True):
        left, top, right, bottom = box
        cropped.append(CroppedMask(top, left, decode_masks([code], height, width)[0, top:bottom, left:right].clone()))
    return cropped


def paste_masks(cropped: Sequence[CroppedMask], height: int, width: int) -> Tensor:
    """Return the masks before `crop_masks`: uint8 (M, H, W)."""
    masks = torch.zeros((len(cropped), height, width), dtype=torch.uint8)
    for mask, (top, left, pixels) in zip(masks, cropped, strict=True):
        mask[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return masks


def label_map_codes(label_map: np.ndarray) -> tuple[list[int], list[RunLengthCode]]:
    """Return the values of a label map (H, W) other than 0, in ascending order, and the mask of each."""
    values = [int(value) for value in np.unique(label_map) if value]
    return values, [coco_mask.encode(np.asfortranarray(label_map == value, dtype=np.uint8)) for value in values]


def label_map(masks: Tensor) -> Tensor:
    """Return a map of ids 1, 2, ..., int64 (H, W), from masks (M, H, W); where masks overlap, the first one counts."""
    ids = torch.zeros(masks.shape[-2:], dtype=torch.int64, device=masks.device)
    for i in range(len(masks), 0, -1):
        ids[masks[i - 1] > 0] = i
    return ids


def mask_boxes(codes: Sequence[RunLengthCode]) -> np.ndarray:
    """Return the bounding boxes of masks: float32 (M, 4), x1, y1, x2, y2."""
    if not codes:
        return np.zeros((0, 4), np.float32)
    boxes = np.asarray(coco_mask.toBbox(list(codes)), dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def mask_areas(codes: Sequence[RunLengthCode]) -> np.ndarray:
    """Return the numbers of pixels of masks: float64 (M,)."""
    return np.asarray(coco_mask.area(list(codes)), dtype=np.float64) if codes else np.zeros(0)


def resize_objects(image: Tensor, objects: Objects, height: int, width: int) -> tuple[Tensor, Objects]:
    """Resize a uint8 image (C, H, W) by bilinear interpolation, and its objects; masks have the nearest value.

    Interpolation is not antialiased, as in torchvision's and Detectron's detectors.
    """
    old_height, old_width = image.shape[-2:]
    if (height, width) == (old_height, old_width):
        return image, objects
    resized = F.interpolate(image[None].float(), (height, width), mode="bilinear")[0].round().to(torch.uint8)
    scale = torch.tensor([width / old_width, height / old_height])
    changed = {**objects, "boxes": objects["boxes"] * scale.repeat(2)}
    if "masks" in objects:
        rows, columns = ((torch.arange(new) * (old / new)).long() for old, new in ((old_height, height), (old_width, width)))
        changed["masks"] = objects["masks"].index_select(1, rows).index_select(2, columns)
    if "keypoints" in objects:
        changed["keypoints"] = torch.cat([objects["keypoints"][..., :2] * scale, objects["keypoints"][..., 2:]], dim=-1)
    return resized, changed


def flip_objects(image: Tensor, objects: Objects, mirrored_keypoints: Sequence[int] = ()) -> tuple[Tensor, Objects]:
    """Flip an image and its objects from left to right.

    Args:
        image: (C, H, W).
        objects: objects of the image.
        mirrored_keypoints: index of the keypoint that each keypoint becomes, such as that of the right eye for the left eye.
    """
    width = image.shape[-1]
    left, top, right, bottom = objects["boxes"].unbind(-1)
    changed = {**objects, "boxes": torch.stack([width - right, top, width - left, bottom], dim=-1)}
    if "masks" in objects:
        changed["masks"] = objects["masks"].flip(-1)
    if "keypoints" in objects:
        x, y, visibility = objects["keypoints"][:, list(mirrored_keypoints)].unbind(-1)
        flipped = torch.stack([width - x, y, visibility], dim=-1)
        changed["keypoints"] = flipped * (visibility > 0)[..., None]  # absent keypoints are zeros
    return image.flip(-1), changed


def transpose_objects(image: Tensor, objects: Objects, mirrored_keypoints: Sequence[int] = ()) -> tuple[Tensor, Objects]:
    """Exchange rows and columns of an image and its objects, a reflection; arguments as in `flip_objects`."""
    changed = {**objects, "boxes": objects["boxes"][:, [1, 0, 3, 2]]}
    if "masks" in objects:
        changed["masks"] = objects["masks"].mT
    if "keypoints" in objects:
        changed["keypoints"] = objects["keypoints"][:, list(mirrored_keypoints)][..., [1, 0, 2]]
    return image.mT, changed


def crop_objects(image: Tensor, objects: Objects, top: int, left: int, height: int, width: int) -> tuple[Tensor, Objects]:
    """Crop a rectangle of an image, and the parts of objects inside.

    Objects without pixels in the crop are removed. The box of a cut object encloses the rest of its mask, or of its box if
    there are no masks.
    """
    region = (..., slice(top, top + height), slice(left, left + width))
    offset = torch.tensor([left, top], dtype=torch.float32)
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = (objects["boxes"] - offset.repeat(2)).clamp(min=torch.zeros(4), max=limits)
    changed = {**objects}
    if "masks" in objects:
        changed["masks"] = objects["masks"][region]
        boxes = torch.where(boxes_are_cut(objects["boxes"], boxes, offset), enclosing_boxes(changed["masks"]), boxes)
    changed["boxes"] = boxes
    if "keypoints" in objects:
        points = objects["keypoints"][..., :2] - offset
        inside = ((points >= 0) & (points < torch.tensor([width, height]))).all(-1, keepdim=True)
        changed["keypoints"] = torch.cat([points, objects["keypoints"][..., 2:]], dim=-1) * inside
    kept = (boxes[:, 2:] > boxes[:, :2]).all(-1)
    return image[region], {name: values[kept] for name, values in changed.items()}


def boxes_are_cut(before: Tensor, after: Tensor, offset: Tensor) -> Tensor:
    """Return whether a crop cuts each box, bool (M, 1), from the boxes before and after it and its corner."""
    return ((before - offset.repeat(2)) != after).any(-1, keepdim=True)


def enclosing_boxes(masks: Tensor) -> Tensor:
    """Return the bounding boxes of masks (M, H, W): float32 (M, 4); zeros for masks without pixels."""
    (left, right), (top, bottom) = (_first_and_end(masks.amax(dim) > 0) for dim in (1, 2))
    return torch.stack([left, top, right, bottom], dim=-1).float()


def _first_and_end(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first true position of each row (M, L), and the position after the last one; zeros if there are none."""
    length = occupied.shape[-1]
    end = torch.where(occupied, torch.arange(1, length + 1), 0).amax(-1)
    return torch.where(occupied, torch.arange(length), length).amin(-1).minimum(end), end
