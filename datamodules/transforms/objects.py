"""Objects of an image: run-length codes, boxes and areas of their masks.

The objects of a training image are a dict of tensors with the names of torchvision: "boxes" (M, 4), float32 x1, y1, x2, y2 in
pixels, where x2 and y2 are the right and lower edges of the last pixel; "labels", int64 (M,), from 1 on; "masks", uint8
(M, H, W), if there are masks; "keypoints", float32 (M, K, 3): x, y, and 2 for visible, 1 for hidden, 0 for absent keypoints.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
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


def enclosing_boxes(masks: Tensor) -> Tensor:
    """Return the bounding boxes of masks (M, H, W): float32 (M, 4); zeros for masks without pixels."""
    (left, right), (top, bottom) = (_first_and_end(masks.amax(dim) > 0) for dim in (1, 2))
    return torch.stack([left, top, right, bottom], dim=-1).float()


def _first_and_end(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first true position of each row (M, L), and the position after the last one; zeros if there are none."""
    length = occupied.shape[-1]
    end = torch.where(occupied, torch.arange(1, length + 1), 0).amax(-1)
    return torch.where(occupied, torch.arange(length), length).amin(-1).minimum(end), end
