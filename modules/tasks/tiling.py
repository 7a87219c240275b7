"""Whole pictures through networks that see a piece at a time: the overlap-tile strategy, in bounded memory.

O. Ronneberger, P. Fischer, T. Brox. U-Net. arXiv:1505.04597, Section 2 and Figure 2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.errors import Refused
from datamodules.transforms.reflect import reflect_index


@dataclass(frozen=True)
class Tiling:
    """How a network takes a picture piece by piece.

    Args:
        largest: side of what it says of a piece at once, in pixels.
        margin: by how much its input is wider than that, half of it on every side.
        grid: it treats pixels alike whose places differ by multiples of this.
        rest: sides that it can have are this more than a multiple of `grid`.

    Raises:
        Refused: it cannot have such a side.
    """

    largest: int
    margin: int
    grid: int
    rest: int = 0

    def __post_init__(self) -> None:
        if self.largest < self.grid + self.rest or (self.largest - self.rest) % self.grid:
            near = self.side(max(self.largest, self.grid + self.rest))
            raise Refused(
                f"model.tile: {self.largest}; this network can have {self.rest} more than {self.grid} times n: {near}"
            )

    def side(self, length: int) -> int:
        """The smallest that covers a length."""
        return max(1, -(-(length - self.rest) // self.grid)) * self.grid + self.rest


def in_tiles(network: Callable[[Tensor], Tensor], image: Tensor, tiling: Tiling) -> Tensor:
    """What a network says of each pixel, tile by tile; beyond the border the picture is continued by its mirror image.

    Tiles lie on the network's grid: for a network whose margin holds all that a pixel depends on, such as U-Net, the result is
    that of one big pass. Others know less of what lies beyond a tile.

    Args:
        network: (N, C, h + margin, w + margin) to (N, K, h, w).
        image: (N, C, H, W), of any size.
        tiling: see there.

    Returns:
        (N, K, H, W).
    """
    height, width = image.shape[-2:]
    high, wide = (min(tiling.largest, tiling.side(length)) for length in (height, width))
    whole: Tensor | None = None
    for top in range(0, max(1, height - tiling.rest), high - tiling.rest):
        for left in range(0, max(1, width - tiling.rest), wide - tiling.rest):
            found = network(piece(image, top, left, (high, wide), tiling.margin))
            if whole is None:
                whole = found.new_empty((*found.shape[:2], height, width))
            part = whole[..., top : top + high, left : left + wide]
            part.copy_(found[..., : part.shape[-2], : part.shape[-1]])
    assert whole is not None
    return whole


def piece(image: Tensor, top: int, left: int, size: tuple[int, int], margin: int) -> Tensor:
    """A piece of (N, C, H, W) that may reach beyond it: (N, C, size + margin), half of the margin on every side."""
    for dim, (first, length) in enumerate(zip((top, left), size, strict=True), start=2):
        places = torch.arange(first - margin // 2, first + length + margin - margin // 2, device=image.device)
        image = image.index_select(dim, reflect_index(places, torch.tensor(image.shape[dim], device=image.device)))
    return image
