"""Random transforms of an image with its objects: scale, crop and symmetries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from datamodules.transforms.objects import Objects, crop_objects, flip_objects, resize_objects, transpose_objects


@dataclass(frozen=True)
class ObjectAugment:
    """Random transforms of training images.

    Args:
        short_sides: lengths of the shorter side, one of them at random; empty for the size of the image.
        long_side: maximum length of the longer side.
        zoom: maximum additional zoom factor; its logarithm is uniform in [-log zoom, log zoom].
        crop: side of a random square; None for the whole image. An image that is smaller is not padded.
        hflip: flip left to right with probability 0.5.
        symmetries: use each of the eight symmetries of the square with probability 1/8.
        mirrored_keypoints: see `flip_objects`.
    """

    short_sides: Sequence[int] = ()
    long_side: int = 1333
    zoom: float = 1.0
    crop: int | None = None
    hflip: bool = True
    symmetries: bool = False
    mirrored_keypoints: Sequence[int] = ()

    def window(self, height: int, width: int, noise: np.ndarray) -> "Window":
        """Choose the part of an image of this size, and the size to which it is resized, from uniform noise (7,)."""
        factor = self.zoom ** (2 * noise[0] - 1)
        if self.short_sides:
            factor *= scale_factor(height, width, self.short_sides[int(noise[1] * len(self.short_sides))], self.long_side)
        size = np.maximum((np.array([height, width]) * factor).astype(int), 1)
        if self.crop is None:
            return Window(0, 0, height, width, int(size[0]), int(size[1]))
        source = np.minimum(np.ceil(self.crop / factor).astype(int), [height, width])
        top, left = (noise[2:4] * (np.array([height, width]) - source + 1)).astype(int)
        size = np.minimum(size, self.crop)
        return Window(int(top), int(left), int(source[0]), int(source[1]), int(size[0]), int(size[1]))

    def transform(self, image: Tensor, objects: Objects, window: "Window", noise: np.ndarray) -> tuple[Tensor, Objects]:
        """Crop, resize and flip an image (C, H, W), uint8, and its objects."""
        if self.crop is not None:
            image, objects = crop_objects(image, objects, window.top, window.left, window.height, window.width)
        image, objects = resize_objects(image, objects, window.new_height, window.new_width)
        if (self.hflip or self.symmetries) and noise[4] < 0.5:
            image, objects = flip_objects(image, objects, self.mirrored_keypoints)
        if self.symmetries and noise[5] < 0.5:
            image, objects = transpose_objects(image, objects, self.mirrored_keypoints)
            image, objects = flip_objects(image, objects, self.mirrored_keypoints)  # from top to bottom
            image, objects = transpose_objects(image, objects, self.mirrored_keypoints)
        if self.symmetries and noise[6] < 0.5:
            image, objects = transpose_objects(image, objects, self.mirrored_keypoints)
        return image, objects


class Window(NamedTuple):
    """A part of an image, and the size to which it is resized."""

    top: int
    left: int
    height: int
    width: int
    new_height: int
    new_width: int


def scale_factor(height: int, width: int, short_side: int, long_side: int) -> float:
    """Return the factor that gives the shorter side a length, or a smaller one so that the longer side is not exceeded."""
    return min(short_side / min(height, width), long_side / max(height, width))
