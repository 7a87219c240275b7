"""The measures of the ISBI 2012 challenge on membranes in electron microscopy, as U-Net's Table 1 has them."""

from functools import cache
from typing import Any

import numpy as np
from scipy.ndimage import label

from callbacks.metrics.base import ImageMetric

THRESHOLDS = tuple(level / 10 for level in range(10))  # 0.0 ... 0.9
# A pixel's neighbours, in the order of the bits of a neighbourhood; by edges are the even ones.
NEIGHBOURS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


class ISBI2012Errors(ImageMetric):
    """The membrane map cut at ten levels; each measure at the level that is best for it, as the challenge's script takes them.

    - `warping-error`: share of the pixels at which a cell is split or two are merged, after the truth was warped towards the
      prediction without changing its topology (Jain et al., CVPR 2010): shifted borders cost nothing. `warping-error/with-additions`
      counts lost and added cells and holes too.
    - `rand-error`: 1 - F of the pairs of pixels that are together in a cell, over the pixels of true cells, those of all
      slices together; a pixel of them that is predicted to be membrane is a cell by itself (the foreground-restricted Rand
      index of Arganda-Carreras et al., 2015).
    - `pixel-error`: share of the pixels on the wrong side, the squared distance of the two maps; `pixel-error/f`: 1 - F of the
      pixels of cells. The challenge names both; which of them its board showed in 2015 we do not know.

    After the definitions on the challenge's pages and the programs in Fiji (Trainable Segmentation), written anew. Expects
    the outputs {"prediction": (N, 2, H, W), of which 1 is the inside of cells, "mask": (N, H, W)}. In tests alone.
    """

    def __init__(self) -> None:
        super().__init__(on_validation=False)

    def update(self, outputs: dict[str, Any], i: int) -> np.ndarray:
        """What is counted at each level, see `error_counts`: (levels, 9)."""
        inside, truth = outputs["prediction"][i, 1].cpu().numpy(), outputs["mask"][i].cpu().numpy() == 1
        return np.array([error_counts(truth, inside > level) for level in THRESHOLDS])

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """See the class."""
        return best_errors(np.sum(states, axis=0))


def best_errors(counted: np.ndarray) -> dict[str, float]:
    """The errors of `ISBI2012Errors` from the sums over all slices of what `error_counts` gives, (levels, 9)."""
    pixels, wrong, both, true, found, split_or_merged, mismatch, together, together_in = counted.T.astype(np.float64)
    errors = {
        "warping-error": split_or_merged / pixels,
        "warping-error/with-additions": mismatch / pixels,
        "rand-error": 1 - 2 * together / np.maximum(together_in, 1),
        "pixel-error": wrong / pixels,
        "pixel-error/f": 1 - 2 * both / np.maximum(true + found, 1),
    }
    return {name: float(values.min()) for name, values in errors.items()}


def error_counts(truth: np.ndarray, prediction: np.ndarray) -> list[int]:
    """What the errors are made of, for bool pictures (H, W), True inside of cells.

    Returns:
        Pixels; those on the wrong side; those inside in both, in the truth, in the prediction; those at which the warped truth
        splits or merges; all in which it differs; pairs of pixels that are together in both; in the truth and in the
        prediction, the two numbers added.
    """
    shape = warp_topology(truth, prediction)
    mismatch = shape != prediction
    pairs = pairs_together(label(truth)[0], label(prediction)[0])
    inside = [int(picture.sum()) for picture in (truth & prediction, truth, prediction)]
    return [
        truth.size,
        int((truth != prediction).sum()),
        *inside,
        splits_and_mergers(shape, mismatch),
        int(mismatch.sum()),
        *pairs,
    ]


def pairs_together(true: np.ndarray, found: np.ndarray) -> tuple[int, int]:
    """Ordered pairs of pixels of true cells that are in one cell in both; in the truth plus in the prediction.

    A pixel is together with itself, and with nothing else where the prediction has membrane.

    Args:
        true, found: numbers of cells (H, W), 0 for membrane.
    """
    in_cells = true > 0
    joint = np.stack([true[in_cells], found[in_cells]]).astype(np.int64)
    alone = int((joint[1] == 0).sum())
    _, of_both = np.unique(joint[:, joint[1] > 0], axis=1, return_counts=True)
    _, of_true = np.unique(joint[0], return_counts=True)
    _, of_found = np.unique(joint[1][joint[1] > 0], return_counts=True)
    both, in_true, in_found = (int((sizes.astype(np.int64) ** 2).sum()) for sizes in (of_both, of_true, of_found))
    return both + alone, in_true + in_found + alone


def splits_and_mergers(shape: np.ndarray, mismatch: np.ndarray) -> int:
    """How many of the pixels that the warped truth cannot give up would split a cell or merge two if it did.

    The others would add or remove a cell, or a hole in one.
    """
    cells = np.pad(label(shape)[0], 1)
    found = 0
    for row, column in np.argwhere(mismatch):
        around = [int(cells[1 + row + down, 1 + column + across]) for down, across in NEIGHBOURS]
        if shape[row, column]:
            inside = sum(bool(number) << bit for bit, number in enumerate(around))
            found += edge_components()[inside] > 1
        else:
            found += len({number for number in around[::2] if number}) > 1
    return found


def warp_topology(truth: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """The truth with every pixel given up that differs and is simple, until there is none: bool (H, W).

    A pixel is simple if changing it merges, splits, makes and removes nothing: neither a part of the inside, connected by
    edges, nor one of the outside, connected by corners too. Around the picture is outside. In rounds, from the borders
    inwards.
    """
    image = np.pad(truth, 1).astype(np.uint8)
    width = image.shape[1]
    goal = np.pad(towards, 1).ravel().tolist()
    steps = [down * width + across for down, across in NEIGHBOURS]
    code = np.zeros_like(image)  # of each pixel, the bits of its neighbours
    for bit, (down, across) in enumerate(NEIGHBOURS):
        code |= np.roll(image, (-down, -across), (0, 1)) << bit
    codes, pixels = code.ravel().tolist(), image.ravel().tolist()
    waiting = [(row + 1) * width + column + 1 for row, column in np.argwhere(truth != towards).tolist()]
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
    """Of each of the 256 neighbourhoods, whether the pixel in its middle is simple: one part inside, one outside."""
    outside = [label(~neighbourhood_mask(code) & ~MIDDLE, np.ones((3, 3)))[1] for code in range(256)]
    return [parts == 1 and count == 1 for parts, count in zip(edge_components(), outside, strict=True)]


@cache
def edge_components() -> list[int]:
    """Of each neighbourhood, how many of its parts, connected by edges, have an edge in common with the middle."""
    found = []
    for code in range(256):
        parts, _ = label(neighbourhood_mask(code))
        found.append(len({parts[1 + down, 1 + across] for down, across in NEIGHBOURS[::2]} - {0}))
    return found


MIDDLE = np.pad(np.ones((1, 1), dtype=bool), 1)


def neighbourhood_mask(code: int) -> np.ndarray:
    """A neighbourhood as a picture: bool (3, 3)."""
    around = np.zeros((3, 3), dtype=bool)
    for bit, (down, across) in enumerate(NEIGHBOURS):
        around[1 + down, 1 + across] = code >> bit & 1
    return around
