"""Center crop of feature maps and images."""

from collections.abc import Sequence

from torch import Tensor


def center_crop(image: Tensor, size: Sequence[int]) -> Tensor:
    """Crop (..., H, W) to the given height and width at the center; the differences must be even."""
    top, left = ((length - target) // 2 for length, target in zip(image.shape[-2:], size, strict=True))
    return image[..., top : top + size[0], left : left + size[1]]
