"""The measures of the ISBI 2012 challenge on membranes in electron microscopy, as U-Net's Table 1 has them."""

from functools import cache
from typing import Any

import numpy as np
from scipy.ndimage import label

from callbacks.per_picture import PerPicture

LEVELS = tuple(level / 20 for level in range(1, 20, 2))  # ten, 0.05 ... 0.95
# A pixel's neighbours, in the order of the bits of a neighbourhood; by edges are the even ones.
AROUND = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


class EMChallenge(PerPicture):
    """The membrane map cut at ten levels; of each measure, the mean over the slices at the level that is best for it.

    - `pixel-error`: share of the pixels on the wrong side.
    - `rand-error`: 1 - F of the pairs of pixels that are in one cell together, over the pixels of true cells (scikit-image's
      adapted Rand error; Arganda-Carreras et al., 2015).
    - `warping-error`: share of the pixels on which the truth still differs after it was warped towards the prediction without
      merging, splitting, making or removing a cell or a hole (Jain et al., CVPR 2010): shifted borders cost nothing.

    The challenge's own program and test labels are not public; these are its definitions as published. Expects the outputs
    {"prediction": (N, 2, H, W), of which 1 is the inside of cells, "mask": (N, H, W)}. In tests alone.
    """

    def __init__(self) -> None:
        super().__init__(while_training=False)

    def keep(self, outputs: dict[str, Any], i: int) -> np.ndarray:
        """The three errors at each level: (levels, 3)."""
        inside, truth = outputs["prediction"][i, 1].cpu().numpy(), outputs["mask"][i].cpu().numpy() == 1
        return np.array([errors(truth, inside > level) for level in LEVELS])

    def put_together(self, kept: list[Any], trainer: Any) -> dict[str, float]:
        """See the class."""
        best = np.mean(kept, axis=0).min(axis=0)
        return dict(zip(("pixel-error", "rand-error", "warping-error"), best.tolist(), strict=True))


def errors(truth: np.ndarray, prediction: np.ndarray) -> tuple[float, float, float]:
    """Pixel, Rand and warping error of bool pictures (H, W), True inside of cells."""
    from skimage.metrics import adapted_rand_error

    rand = adapted_rand_error(label(truth)[0], label(prediction)[0])[0]
    return (truth != prediction).mean(), rand, (warped(truth, prediction) != prediction).mean()


def warped(truth: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """The truth with every pixel given up that differs and is simple, until there is none: bool (H, W).

    A pixel is simple if changing it merges, splits, makes and removes nothing: neither a part of the inside, connected by
    edges, nor one of the outside, connected by corners too. Around the picture is outside. In rounds, from the borders
    inwards.
    """
    image = np.pad(truth, 1).astype(np.uint8)
    width = image.shape[1]
    goal = np.pad(towards, 1).ravel().tolist()
    steps = [down * width + across for down, across in AROUND]
    code = np.zeros_like(image)  # of each pixel, the bits of its neighbours
    for bit, (down, across) in enumerate(AROUND):
        code |= np.roll(image, (-down, -across), (0, 1)) << bit
    codes, pixels = code.ravel().tolist(), image.ravel().tolist()
    differing = [int(place) for place in np.flatnonzero(image[1:-1, 1:-1] != np.pad(towards, 1)[1:-1, 1:-1])]
    waiting = [(place // (width - 2) + 1) * width + place % (width - 2) + 1 for place in differing]
    simple = simple_neighbourhoods()
    while waiting:
        left = []
        for place in waiting:
            if not simple[codes[place]]:
                left.append(place)
                continue
            pixels[place] = goal[place]
            for bit, step in enumerate(steps):  # this pixel is the opposite neighbour of its neighbours
                codes[place + step] ^= 1 << (bit + 4) % 8
        if len(left) == len(waiting):
            break
        waiting = left
    return np.array(pixels, dtype=bool).reshape(image.shape)[1:-1, 1:-1]


@cache
def simple_neighbourhoods() -> list[bool]:
    """Of each of the 256 neighbourhoods, whether the pixel in its middle is simple."""
    found = []
    for code in range(256):
        ring = [bool(code >> bit & 1) for bit in range(8)]
        around = np.zeros((3, 3), dtype=bool)
        for (down, across), inside in zip(AROUND, ring, strict=True):
            around[1 + down, 1 + across] = inside
        parts, _ = label(around)  # by edges
        touching = {parts[1 + down, 1 + across] for down, across in AROUND[::2]} - {0}
        outside = ~around
        outside[1, 1] = False
        _, count = label(outside, np.ones((3, 3)))
        found.append(len(touching) == 1 and count == 1)
    return found
