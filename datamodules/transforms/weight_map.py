"""Pixel weights of U-Net's loss: higher for rare classes and for the background between close cells.

O. Ronneberger, P. Fischer, T. Brox. U-Net. arXiv:1505.04597, eq. 2.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects

CUTOFF_SIGMAS = 5  # the exponential is below 4e-6 beyond this distance


def border_weight(instance_ids: np.ndarray, w0: float = 10.0, sigma: float = 5.0) -> np.ndarray:
    """Compute eq. 2 without its class weights: w0 exp(-(d1 + d2)**2 / (2 sigma**2)) on the background, 0 within cells.

    d1 and d2 are the distances to the nearest and the second-nearest cell. The distance to a cell is computed in a window of
    5 sigma around the cell.

    Args:
        instance_ids: instance ids (H, W), 0 for the background.
        w0: largest weight.
        sigma: width of the border in pixels.

    Returns:
        float32 (H, W).
    """
    radius = int(np.ceil(CUTOFF_SIGMAS * sigma))
    nearest = np.full((2, *instance_ids.shape), np.inf, dtype=np.float32)  # d1, d2
    for cell, box in enumerate(find_objects(instance_ids), start=1):
        if box is None:
            continue
        window = tuple(slice(max(0, side.start - radius), side.stop + radius) for side in box)
        distance = distance_transform_edt(instance_ids[window] != cell).astype(np.float32)
        first, second = (distances[window] for distances in nearest)
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    weight = w0 * np.exp(-(nearest.sum(0) ** 2) / (2 * sigma**2))
    return np.where(instance_ids == 0, weight, 0).astype(np.float32)


def class_weights(counts: np.ndarray) -> np.ndarray:
    """Compute the class weights of eq. 2: inverse class frequencies, scaled to a mean of 1 over all pixels.

    Args:
        counts: pixels of each class in the training set (K,).

    Returns:
        float32 (K,); 0 for absent classes.
    """
    present = counts > 0
    weights = np.zeros(len(counts))
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights.astype(np.float32)


def separate_instances(instance_ids: np.ndarray) -> np.ndarray:
    """Separate touching cells: pixels with another cell in their 8-neighborhood become background.

    Section 3, "separation border".

    Args:
        instance_ids: instance ids (H, W), 0 for the background.

    Returns:
        Instance ids (H, W) of the same dtype.
    """
    padded = np.pad(instance_ids, 1, mode="edge")
    touching = np.zeros(instance_ids.shape, dtype=bool)
    for down in range(3):
        for across in range(3):
            other = padded[down : down + instance_ids.shape[0], across : across + instance_ids.shape[1]]
            touching |= (other != instance_ids) & (other > 0)
    return np.where(touching, 0, instance_ids)
