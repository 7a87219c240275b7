"""The weights of pixels in U-Net's loss: rare classes count more, and so does the ground between cells that nearly touch.

O. Ronneberger, P. Fischer, T. Brox. U-Net. arXiv:1505.04597, eq. 2.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects

REACH = 5  # sigmas: further from two cells the exponential is below 4e-6


def border_weight(instance_ids: np.ndarray, w0: float = 10.0, sigma: float = 5.0) -> np.ndarray:
    """Eq. 2 without its class weights: w0 exp(-(d1 + d2)**2 / (2 sigma**2)) on the ground, 0 within cells.

    d1 and d2 are the distances to the nearest and to the second nearest cell. A cell's distances are computed only as far
    around it as they matter.

    Args:
        instance_ids: instance ids (H, W), 0 for the ground.
        w0: its largest value.
        sigma: in pixels.

    Returns:
        float32 (H, W).
    """
    reach = int(np.ceil(REACH * sigma))
    nearest = np.full((2, *instance_ids.shape), np.inf, dtype=np.float32)  # d1, d2
    for cell, box in enumerate(find_objects(instance_ids), start=1):
        if box is None:
            continue
        around = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in box)
        distance = distance_transform_edt(instance_ids[around] != cell).astype(np.float32)
        first, second = (found[around] for found in nearest)
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    weight = w0 * np.exp(-(nearest.sum(0) ** 2) / (2 * sigma**2))
    return np.where(instance_ids == 0, weight, 0).astype(np.float32)


def class_weights(counts: np.ndarray) -> np.ndarray:
    """Eq. 2's class weights: the inverse of each class's share, with a mean over all pixels of 1.

    Args:
        counts: pixels of each class in the training set (K,).

    Returns:
        float32 (K,); 0 for a class that is not there.
    """
    there = counts > 0
    weights = np.zeros(len(counts))
    weights[there] = counts.sum() / (there.sum() * counts[there])
    return weights.astype(np.float32)


def separate_instances(instance_ids: np.ndarray) -> np.ndarray:
    """Cells of which no two touch: pixels with a pixel of another cell among their eight neighbours become ground.

    Section 3, "separation border".

    Args:
        instance_ids: instance ids (H, W), 0 for the ground.
    """
    padded = np.pad(instance_ids, 1, mode="edge")
    touching = np.zeros(instance_ids.shape, dtype=bool)
    for down in range(3):
        for across in range(3):
            other = padded[down : down + instance_ids.shape[0], across : across + instance_ids.shape[1]]
            touching |= (other != instance_ids) & (other > 0)
    return np.where(touching, 0, instance_ids)
