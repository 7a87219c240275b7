"""Masks: one class id a pixel."""

import numpy as np

IGNORE = 255  # a pixel that does not count


def thinned(mask: np.ndarray, shrink: int) -> np.ndarray:
    """A mask (H, W) a whole number of times smaller: of each block, the value in its middle."""
    height, width = (side // shrink for side in mask.shape)
    return np.ascontiguousarray(mask[shrink // 2 :: shrink, shrink // 2 :: shrink][:height, :width])
