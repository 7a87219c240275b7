"""A part of an image that is resized and flipped, with the boxes and keypoints in it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Window(NamedTuple):
    """A part of an image, the size to which it is resized, and the symmetry of the square that is applied last.

    Args:
        top, left, height, width: the part, in pixels.
        new_height, new_width: its size after resizing.
        mirrored: flip it from left to right.
        upside_down: flip it from top to bottom.
        transposed: exchange its rows and columns, after the flips.
    """

    top: int
    left: int
    height: int
    width: int
    new_height: int
    new_width: int
    mirrored: bool = False
    upside_down: bool = False
    transposed: bool = False

    @property
    def final_shape(self) -> tuple[int, int]:
        """Height and width of the result."""
        return (self.new_width, self.new_height) if self.transposed else (self.new_height, self.new_width)


def source_positions(window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, int64 (new_height,), and columns, int64 (new_width,), of the image that a resized window shows."""
    rows, columns = (
        start + (np.arange(new_length, dtype=np.float32) * np.float32(length / new_length)).astype(np.int64)
        for start, length, new_length in (
            (window.top, window.height, window.new_height),
            (window.left, window.width, window.new_width),
        )
    )
    return rows, columns


def change_symmetry(pixels: Tensor, window: Window) -> Tensor:
    """Flip and transpose pixels (..., new_height, new_width): (..., *window.final_shape)."""
    axes = [axis for axis, flipped in ((-2, window.upside_down), (-1, window.mirrored)) if flipped]
    flipped = pixels.flip(axes) if axes else pixels
    return flipped.mT if window.transposed else flipped


def move_image(image: Tensor, window: Window) -> Tensor:
    """Crop, resize and flip a uint8 image (C, H, W): (C, *window.final_shape).

    Interpolation is bilinear and not antialiased, as in torchvision's and Detectron's detectors.
    """
    part = image[:, window.top : window.top + window.height, window.left : window.left + window.width]
    size = (window.new_height, window.new_width)
    if part.shape[-2:] != size:
        part = F.interpolate(part[None].float(), size, mode="bilinear")[0].round().to(torch.uint8)
    return change_symmetry(part, window)


def crop_boxes(boxes: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return the parts of boxes, float32 (M, 4), in a window, relative to its corner, and which of them are cut, bool (M,)."""
    moved = boxes - np.array([window.left, window.top] * 2, np.float32)
    cropped = np.minimum(np.maximum(moved, 0), np.array([window.width, window.height] * 2, np.float32))
    return cropped, (cropped != moved).any(1)


def crop_keypoints(keypoints: np.ndarray, window: Window) -> np.ndarray:
    """Return keypoints, float32 (M, K, 3), relative to the corner of a window; zeros for those outside."""
    points = keypoints - np.array([window.left, window.top, 0], np.float32)
    is_inside = (points[..., :2] >= 0) & (points[..., :2] < (window.width, window.height))
    return points * is_inside.all(-1, keepdims=True)


def move_boxes(boxes: np.ndarray, window: Window) -> np.ndarray:
    """Resize and flip boxes, float32 (M, 4), with the window in which they are."""
    moved = boxes * np.array([window.new_width / window.width, window.new_height / window.height] * 2, np.float32)
    for axis, length in _flipped_axes(window):
        moved[:, [axis, axis + 2]] = length - moved[:, [axis + 2, axis]]
    return moved[:, [1, 0, 3, 2]] if window.transposed else moved


def move_keypoints(keypoints: np.ndarray, window: Window, mirrored_keypoints: Sequence[int]) -> np.ndarray:
    """Resize and flip keypoints with the window in which they are.

    Args:
        keypoints: float32 (M, K, 3): x, y and visibility; absent keypoints are zeros.
        window: the window.
        mirrored_keypoints: index of the keypoint that each keypoint becomes, such as that of the right eye for the left eye.
    """
    moved = keypoints * np.array([window.new_width / window.width, window.new_height / window.height, 1], np.float32)
    for axis, length in _flipped_axes(window):
        moved = moved[:, list(mirrored_keypoints)]
        moved[..., axis] = length - moved[..., axis]
        moved *= moved[..., 2:] > 0
    return moved[:, list(mirrored_keypoints)][..., [1, 0, 2]] if window.transposed else moved


def _flipped_axes(window: Window) -> list[tuple[int, int]]:
    """Return the index of each flipped coordinate, 0 for x, and the length of the window along it."""
    flips = ((window.mirrored, 0, window.new_width), (window.upside_down, 1, window.new_height))
    return [(axis, length) for flipped, axis, length in flips if flipped]
