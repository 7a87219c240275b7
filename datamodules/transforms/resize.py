"""MATLAB's bicubic ``imresize``, as used by the classical super-resolution tables.

MATLAB has two modes. Floating point is never quantized (used in the tables); uint8 is rounded and clipped after each of
the two passes (used for the published LR images in PNG). Both use the antialiased Keys kernel with a = -0.5 and a
replicated border.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def cubic(x: np.ndarray) -> np.ndarray:
    """Evaluate Keys' cubic convolution kernel with a = -0.5 (R. Keys, 1981), support [-2, 2]."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def resize_matrix(length: int, new_length: int) -> Tensor:
    """Return one pass of ``imresize`` as a float64 matrix (new_length, length), including the replicated border."""
    scale = new_length / length
    stretch = min(scale, 1.0)  # antialiasing: the kernel is widened by 1 / scale when downscaling
    support = 4 / stretch
    # Output i (from 1) is at input position u = i / scale + (1 - 1 / scale) / 2, as in MATLAB.
    position = np.arange(1, new_length + 1) / scale + 0.5 * (1 - 1 / scale)
    first = np.floor(position - support / 2)
    taps = first[:, None] + np.arange(int(np.ceil(support)) + 2)  # (new_length, taps)
    weights = stretch * cubic(stretch * (position[:, None] - taps))
    weights /= weights.sum(axis=1, keepdims=True)
    columns = np.clip(taps - 1, 0, length - 1).astype(np.int64)
    matrix = np.zeros((new_length, length))
    np.add.at(matrix, (np.arange(new_length)[:, None], columns), weights)
    return torch.from_numpy(matrix)


def imresize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as MATLAB's ``imresize(image, size, 'bicubic')``, in the mode of the image's dtype.

    Args:
        image: (..., height, width), floating point of any range, or uint8.
        size: height and width of the result.

    Returns:
        (..., *size) of the same dtype. Floating point is neither clipped nor rounded and may exceed the input's range.
    """
    height, width = size
    dtype = torch.float64 if image.dtype == torch.uint8 else image.dtype
    rows = _placed_matrix(image.shape[-2], height, dtype, image.device)
    columns = _placed_matrix(image.shape[-1], width, dtype, image.device)
    with torch.autocast(image.device.type, enabled=False):  # which would multiply the matrices in 16 bits
        if image.dtype == torch.uint8:
            tall = _round(rows @ image.double())
            return _round(tall @ columns.T).to(torch.uint8)
        return rows @ image @ columns.T


@lru_cache(maxsize=256)
def _placed_matrix(length: int, new_length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `resize_matrix` on the device, cached to avoid copies during training."""
    return resize_matrix(length, new_length).to(device, dtype)


def _round(values: Tensor) -> Tensor:
    return (values + 0.5).floor_().clamp_(0, 255)
