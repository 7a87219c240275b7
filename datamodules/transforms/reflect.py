"""Reflection at image borders."""

from torch import Tensor


def reflect_index(index: Tensor, length: Tensor) -> Tensor:
    """Map integer positions of any size into [0, length) by reflection at the centers of the first and last pixel.

    Args:
        index: whole positions, of an integer or a floating-point type that represents them exactly.
        length: number of pixels along the axis, int64, broadcast against `index`.

    Returns:
        Positions in [0, length), shaped as `index` and of its type.
    """
    last = (length - 1).to(index.dtype)
    if index.device.type != "cpu" or not is_near(index, int(length.min())):
        index = index.remainder((2 * last).clamp(min=1))
    return last - (last - index.abs()).abs()


def is_near(index: Tensor, length: int) -> bool:
    """Return whether one reflection maps all positions into [0, length); further ones need a remainder, which is slow."""
    low, high = index.aminmax()
    return bool(low > -length) and bool(high < 2 * length - 1)
