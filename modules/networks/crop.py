"""Central crops of feature maps and images."""

from collections.abc import Sequence

from torch import Tensor


def center_crop(image: Tensor, size: Sequence[int]) -> Tensor:
    """Crop (..., H, W) to the given height and width, at its center; both margins are even."""
    top, left = ((have - want) // 2 for have, want in zip(image.shape[-2:], size, strict=True))
    return image[..., top : top + size[0], left : left + size[1]]
