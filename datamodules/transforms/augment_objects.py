"""Random transforms of an image with its objects: scale, crop and symmetries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.transforms.window import Window


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
        mirrored_keypoints: see `move_keypoints`.
    """

    short_sides: Sequence[int] = ()
    long_side: int = 1333
    zoom: float = 1.0
    crop: int | None = None
    hflip: bool = True
    symmetries: bool = False
    mirrored_keypoints: Sequence[int] = ()

    def window(self, height: int, width: int, noise: np.ndarray) -> Window:
        """Choose the part of an image of this size, and its size and symmetry, from uniform noise (7,)."""
        zoom, choice, down, across, *flips = noise.tolist()
        factor = self.zoom ** (2 * zoom - 1)
        if self.short_sides:
            factor *= scale_factor(height, width, self.short_sides[int(choice * len(self.short_sides))], self.long_side)
        symmetry = (self.hflip or self.symmetries) and flips[0] < 0.5, *(self.symmetries and flip < 0.5 for flip in flips[1:])
        new_height, new_width = max(int(height * factor), 1), max(int(width * factor), 1)
        if self.crop is None:
            return Window(0, 0, height, width, new_height, new_width, *symmetry)
        side = math.ceil(self.crop / factor)
        source_height, source_width = min(side, height), min(side, width)
        top, left = int(down * (height - source_height + 1)), int(across * (width - source_width + 1))
        size = min(new_height, self.crop), min(new_width, self.crop)
        return Window(top, left, source_height, source_width, *size, *symmetry)


def scale_factor(height: int, width: int, short_side: int, long_side: int) -> float:
    """Return the factor that gives the shorter side a length, or a smaller one so that the longer side is not exceeded."""
    return min(short_side / min(height, width), long_side / max(height, width))
