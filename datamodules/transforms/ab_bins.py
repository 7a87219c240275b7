"""The 313 bins of quantized colors of Zhang et al., arXiv:1603.08511, Section 2.1, and distributions over them.

The bins are the nodes of a grid with a spacing of 10 in a and b. The set is larger than the gamut of sRGB, so it does not
follow from the text of the paper: it is that of the authors' file pts_in_hull.npy.
"""

from functools import cache
from itertools import product

import torch
from torch import Tensor

SPACING = 10
SIGMA = 5.0  # of both Gaussians, in Lab units
# Range of b for each a.
_B_RANGES = {
    -90: (50, 90), -80: (20, 90), -70: (0, 90), -60: (-20, 90), -50: (-30, 100), -40: (-40, 100), -30: (-50, 100),
    -20: (-50, 100), -10: (-60, 100), 0: (-70, 100), 10: (-80, 90), 20: (-80, 90), 30: (-90, 90), 40: (-100, 90),
    50: (-100, 80), 60: (-110, 80), 70: (-110, 80), 80: (-110, 70), 90: (-110, 70), 100: (-90, 0),
}  # fmt: skip
BINS = torch.tensor([(a, b) for a, (low, high) in _B_RANGES.items() for b in range(low, high + SPACING, SPACING)]).float()
LEAST_TEMPERATURE = 1e-6  # the annealed mean is then the mode; smaller values overflow
CELL = 2.5  # side of the cells of `_candidates`, in Lab units
CELLS = 96  # on each side; the cells cover -120 ... 120


def nearest_bins(ab: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the nearest bins of colors.

    The search is among the few bins that can be nearest in the cell of a color, and not among all 313.

    Args:
        ab: (M, 2), in -120 ... 120.
        count: number of bins.

    Returns:
        Indices of the bins, nearest first, int64 (M, count), and squared distances (M, count).
    """
    cells = ((ab + CELL * CELLS / 2) / CELL).long().clamp(0, CELLS - 1)
    candidates = _candidates_on(count, ab.device)[cells[:, 0] * CELLS + cells[:, 1]]  # (M, candidates)
    distances = (ab[:, None] - _bins(ab.device, ab.dtype)[candidates]).square().sum(-1)
    nearest, order = distances.topk(count, dim=1, largest=False)
    return candidates.gather(1, order), nearest


@cache
def _bins(device: torch.device, dtype: torch.dtype) -> Tensor:
    return BINS.to(device, dtype)


@cache
def _candidates_on(count: int, device: torch.device) -> Tensor:
    return _candidates(count).to(device)


@cache
def _candidates(count: int) -> Tensor:
    """Return the bins that can be among the `count` nearest ones of a color, for each cell: int64 (CELLS**2, candidates)."""
    lows = torch.tensor(list(product(range(CELLS), repeat=2))).float() * CELL - CELL * CELLS / 2  # (cells, 2)
    offsets = (BINS - (lows[:, None] + CELL / 2)).abs()  # from the center of the cell, (cells, bins, 2)
    least = (offsets - CELL / 2).clamp(min=0).norm(dim=-1)
    most = (offsets + CELL / 2).norm(dim=-1)
    bound = most.kthvalue(count, dim=1, keepdim=True).values  # `count` bins are at most as far as this
    width = int((least <= bound).sum(1).max())
    return least.topk(width, dim=1, largest=False).indices


def soft_encode(ab: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """Encode colors (M, 2) as a distribution over their nearest bins, with weights of a Gaussian of the distance.

    Returns:
        Indices of the bins, nearest first, int64 (M, neighbors), and weights with a sum of 1, (M, neighbors).
    """
    indices, distances = nearest_bins(ab, neighbors)
    return indices, torch.softmax(-distances / (2 * SIGMA**2), dim=1)


def annealed_mean(logits: Tensor, temperature: float) -> Tensor:
    """Return the annealed mean of color distributions (eq. 5): their expectation after division of the logits by T.

    Args:
        logits: (N, 313, H, W).
        temperature: T; 1 for the mean, near 0 for the mode.

    Returns:
        a and b, (N, 2, H, W).
    """
    probabilities = torch.softmax(logits / max(temperature, LEAST_TEMPERATURE), dim=1)
    return torch.einsum("nqhw,qc->nchw", probabilities, _bins(logits.device, logits.dtype))


def smooth(counts: Tensor) -> Tensor:
    """Smooth the counts of colors (313,) with a Gaussian in Lab, and normalize them: a distribution (313,)."""
    kernel = torch.exp(-torch.cdist(BINS, BINS).square() / (2 * SIGMA**2)).to(counts)
    smoothed = kernel @ (counts / counts.sum())
    return smoothed / smoothed.sum()


def rebalancing_weights(distribution: Tensor, uniform_weight: float) -> Tensor:
    """Return the weights of the bins (eq. 4), inverse to a mixture of a distribution and the uniform one.

    Args:
        distribution: smoothed distribution of colors, (313,).
        uniform_weight: lambda, weight of the uniform distribution in [0, 1]; with 1, all weights are equal.

    Returns:
        (313,); the expectation under `distribution` is 1. Bins whose mixture is 0 have the weight 0.
    """
    mixture = (1 - uniform_weight) * distribution + uniform_weight / len(distribution)
    weights = torch.where(mixture > 0, 1 / mixture, 0.0)
    return weights / (distribution * weights).sum()
