"""Metrics of the ISBI 2012 challenge on membranes in electron microscopy, as in U-Net's Table 1."""

from functools import cache
from typing import Any

import numpy as np
from scipy.ndimage import label

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError
from datamodules.transforms.downsample import IGNORE_INDEX

THRESHOLDS = tuple(level / 10 for level in range(10))  # 0.0 ... 0.9
# Offsets of a pixel's neighbors, in the order of the bits of a neighborhood code; those at even positions share an edge.
NEIGHBORS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


class ISBI2012Errors(ImageMetric):
    """Errors of the membrane map, each at its own best threshold out of ten, as in the challenge's script.

    - `warping-error`: fraction of pixels at which a cell is split or two cells are merged. The truth is first warped towards
      the prediction without changing its topology (Jain et al., CVPR 2010), so that shifted borders are not errors.
      `warping-error/with-additions` also counts lost and added cells and holes.
    - `rand-error`: 1 - F of the pairs of pixels that share a cell, over the pixels of true cells in all slices. A pixel of a
      true cell that is predicted to be membrane is a cell of one pixel. This is the foreground-restricted Rand index
      (Arganda-Carreras et al., 2015).
    - `pixel-error`: fraction of misclassified pixels, the squared distance between the two maps. `pixel-error/f`: 1 - F of the
      pixels of cells. The challenge mentions both; it is unknown which one its leaderboard showed in 2015.

    This is a new implementation of the definitions on the challenge's pages and in Fiji (Trainable Segmentation). It is
    evaluated only at tests. Required outputs: {"prediction": (N, 2, H, W), class 1 is the inside of cells, "mask": (N, H, W)}.
    """

    required_outputs = ("prediction", "mask")

    def __init__(self) -> None:
        super().__init__(on_validation=False)

    def update(self, outputs: dict[str, Any], i: int) -> np.ndarray:
        """Return the counts of `error_counts` at each threshold: (thresholds, 9)."""
        inside, mask = outputs["prediction"][i, 1].cpu().numpy(), outputs["mask"][i].cpu().numpy()
        if (mask == IGNORE_INDEX).any():
            raise UserError(
                f"{outputs['name'][i]}: ignored pixels (255) have no place in the measures of ISBI 2012. Remove them"
            )
        truth = mask == 1
        return np.array([error_counts(truth, inside > level) for level in THRESHOLDS])

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        return best_errors(np.sum(states, axis=0))


def best_errors(counts: np.ndarray) -> dict[str, float]:
    """Return the errors of `ISBI2012Errors` from `error_counts` summed over all slices, (thresholds, 9)."""
    pixels, misclassified, both, true, found, split_or_merged, mismatch, joint_pairs, total_pairs = counts.T.astype(np.float64)
    errors = {
        "warping-error": split_or_merged / pixels,
        "warping-error/with-additions": mismatch / pixels,
        "rand-error": 1 - 2 * joint_pairs / np.maximum(total_pairs, 1),
        "pixel-error": misclassified / pixels,
        "pixel-error/f": 1 - 2 * both / np.maximum(true + found, 1),
    }
    return {name: float(values.min()) for name, values in errors.items()}


def error_counts(truth: np.ndarray, prediction: np.ndarray) -> list[int]:
    """Count the errors between bool images (H, W), True inside of cells.

    Returns:
        Nine counts: pixels; misclassified pixels; inside pixels in both, in the truth, in the prediction; pixels of splits and
        mergers of the warped truth; all pixels at which it differs from the prediction; pairs of pixels that share a cell in
        both images; the pairs in the truth plus those in the prediction.
    """
    shape = warp_topology(truth, prediction)
    mismatch = shape != prediction
    pairs = pairs_together(label(truth)[0], label(prediction)[0])
    inside = [int(mask.sum()) for mask in (truth & prediction, truth, prediction)]
    return [
        truth.size,
        int((truth != prediction).sum()),
        *inside,
        splits_and_mergers(shape, mismatch),
        int(mismatch.sum()),
        *pairs,
    ]


def pairs_together(true: np.ndarray, found: np.ndarray) -> tuple[int, int]:
    """Count ordered pairs of pixels of true cells that share a cell: in both images; in the truth plus in the prediction.

    A pixel also forms a pair with itself. A pixel of predicted membrane forms no other pair in the prediction.

    Args:
        true, found: labels of cells (H, W), 0 for membrane.
    """
    in_cells = true > 0
    joint = np.stack([true[in_cells], found[in_cells]]).astype(np.int64)
    singletons = int((joint[1] == 0).sum())
    _, both_sizes = np.unique(joint[:, joint[1] > 0], axis=1, return_counts=True)
    _, true_sizes = np.unique(joint[0], return_counts=True)
    _, found_sizes = np.unique(joint[1][joint[1] > 0], return_counts=True)
    both, in_true, in_found = (int((sizes.astype(np.int64) ** 2).sum()) for sizes in (both_sizes, true_sizes, found_sizes))
    return both + singletons, in_true + in_found + singletons


def splits_and_mergers(shape: np.ndarray, mismatch: np.ndarray) -> int:
    """Count the pixels of `mismatch` whose change in the warped truth would split a cell or merge two cells.

    A change of any other pixel of `mismatch` would add or remove a cell or a hole.
    """
    cells = np.pad(label(shape)[0], 1)
    found = 0
    for row, column in np.argwhere(mismatch):
        neighbors = [int(cells[1 + row + dy, 1 + column + dx]) for dy, dx in NEIGHBORS]
        if shape[row, column]:
            inside = sum(bool(cell) << bit for bit, cell in enumerate(neighbors))
            found += edge_components()[inside] > 1
        else:
            found += len({cell for cell in neighbors[::2] if cell}) > 1
    return found


def warp_topology(truth: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Flip all differing simple pixels of the truth until none is left: bool (H, W).

    A pixel is simple if its change does not merge, split, create or remove a component of the inside or of the outside. The
    inside is connected by edges, the outside by edges and corners. Pixels beyond the image count as outside. The pixels are
    processed in rounds, until no simple pixel is left.
    """
    image = np.pad(truth, 1).astype(np.uint8)
    width = image.shape[1]
    target_pixels = np.pad(target, 1).ravel().tolist()
    offsets = [dy * width + dx for dy, dx in NEIGHBORS]
    code = np.zeros_like(image)  # for each pixel, the bits of its neighbors
    for bit, (dy, dx) in enumerate(NEIGHBORS):
        code |= np.roll(image, (-dy, -dx), (0, 1)) << bit
    codes, pixels = code.ravel().tolist(), image.ravel().tolist()
    pending = [(row + 1) * width + column + 1 for row, column in np.argwhere(truth != target).tolist()]
    simple = simple_neighborhoods()
    while pending:
        remaining = []
        for position in pending:
            if not simple[codes[position]]:
                remaining.append(position)
                continue
            pixels[position] = target_pixels[position]
            for bit, offset in enumerate(offsets):  # for its neighbor, this pixel is in the opposite direction
                codes[position + offset] ^= 1 << (bit + 4) % 8
        if len(remaining) == len(pending):
            break
        pending = remaining
    return np.array(pixels, dtype=bool).reshape(image.shape)[1:-1, 1:-1]


@cache
def simple_neighborhoods() -> list[bool]:
    """Return, for each of the 256 neighborhoods, whether its center is simple: one component inside, one outside."""
    outside = [label(~neighborhood_mask(code) & ~CENTER, np.ones((3, 3)))[1] for code in range(256)]
    return [components == 1 and count == 1 for components, count in zip(edge_components(), outside, strict=True)]


@cache
def edge_components() -> list[int]:
    """Return, for each neighborhood, the number of its edge-connected components that share an edge with the center."""
    found = []
    for code in range(256):
        components, _ = label(neighborhood_mask(code))
        found.append(len({components[1 + dy, 1 + dx] for dy, dx in NEIGHBORS[::2]} - {0}))
    return found


CENTER = np.pad(np.ones((1, 1), dtype=bool), 1)


def neighborhood_mask(code: int) -> np.ndarray:
    """Return a neighborhood as an image: bool (3, 3)."""
    neighbors = np.zeros((3, 3), dtype=bool)
    for bit, (dy, dx) in enumerate(NEIGHBORS):
        neighbors[1 + dy, 1 + dx] = code >> bit & 1
    return neighbors
