"""Scenes composed of real digits of MNIST, with exact masks: a small dataset of instance segmentation with ten classes.

A scene has 2 to 6 digits of random size, position and color on a black background. Later digits cover earlier ones.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.catalog.array_readers import read_digits
from datamodules.random.noise import uniform

SIDE = 128  # of a scene, in pixels
SCENE_CLASSES = tuple(str(digit) for digit in range(10))  # digit d has the label d + 1
MIN_VISIBLE = 0.5  # a digit of which less is visible is not placed
SPLITS = {"train": (0, 4000, 4000), "val": (4000, 4500, 100), "test": (4500, 5000, 400)}  # embedded digits, number of scenes
DIGIT_SIDES = (28, 80)  # smallest and largest side of a digit, in pixels
ATTEMPTS = 8  # digits that are tried in each scene


class Scene(NamedTuple):
    """A scene and its objects."""

    pixels: Tensor  # uint8 (3, SIDE, SIDE)
    masks: Tensor  # bool (M, SIDE, SIDE), of the visible parts
    labels: list[int]  # M labels


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    return read_digits("all")


def scene_names(split: str) -> list[str]:
    """Return the names of the scenes of a split."""
    return [f"{split}-{number:04d}" for number in range(SPLITS[split][2])]


@lru_cache(maxsize=64)
def digit_scene(split: str, number: int) -> Scene:
    """Compose a scene; it is a function of the split and the number."""
    first, end, _ = SPLITS[split]
    images, digit_labels = _digits()
    noise = uniform(0, f"digit-scenes/{split}", [number], ATTEMPTS * 8 + 1)[0]
    count = 2 + int(noise[-1] * 5)
    canvas, masks, labels = torch.zeros(3, SIDE, SIDE), torch.zeros(0, SIDE, SIDE, dtype=torch.bool), list[int]()
    for values in noise[:-1].reshape(ATTEMPTS, 8):
        index = first + int(values[0] * (end - first))
        side = DIGIT_SIDES[0] + int(values[1] * (DIGIT_SIDES[1] - DIGIT_SIDES[0]))
        top, left = (int(value * (SIDE - side + 1)) for value in values[2:4])
        digit = torch.from_numpy(images[index]).float()[None] / 255  # (1, 1, 28, 28)
        opacity = torch.zeros(SIDE, SIDE)
        opacity[top : top + side, left : left + side] = F.interpolate(digit, (side, side), mode="bilinear", antialias=True)[
            0, 0
        ]
        mask = opacity >= 0.5
        visible = masks & ~mask
        hides_too_much = (visible.sum((1, 2)) < MIN_VISIBLE * masks.sum((1, 2))).any()
        if hides_too_much or len(labels) == count:
            continue
        color = torch.from_numpy(0.4 + 0.6 * values[4:7]).float()[:, None, None]
        canvas = torch.lerp(canvas, color.expand_as(canvas), opacity)
        masks = torch.cat([visible, mask[None]])
        labels.append(int(digit_labels[index]) + 1)
    return Scene((canvas * 255).round().to(torch.uint8), masks, labels)
