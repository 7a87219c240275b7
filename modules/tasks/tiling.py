"""Whole pictures through networks that see a piece at a time: the overlap-tile strategy, in bounded memory.

O. Ronneberger, P. Fischer, T. Brox. U-Net. arXiv:1505.04597, Section 2 and Figure 2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.errors import UserError
from datamodules.transforms.reflect import reflect_index


@dataclass(frozen=True)
class Tiling:
    """How a network takes a picture piece by piece.

    Args:
        tile_size: side of what it says of a piece at once, in pixels.
        margin: by how much its input is wider than that, half of it on every side.
        stride: it treats pixels alike whose places differ by multiples of this.
        offset: sides that it can have are this more than a multiple of `stride`.

    Raises:
        Refused: it cannot have such a side.
    """

    tile_size: int
    margin: int
    stride: int
    offset: int = 0

    def __post_init__(self) -> None:
        if self.tile_size < self.stride + self.offset or (self.tile_size - self.offset) % self.stride:
            near = self.round_up(max(self.tile_size, self.stride + self.offset))
            raise UserError(
                f"model.tile_size: {self.tile_size}; this network can have {self.offset} more than {self.stride} times n: {near}"
            )

    def round_up(self, length: int) -> int:
        """The smallest that covers a length."""
        return max(1, -(-(length - self.offset) // self.stride)) * self.stride + self.offset


def predict_tiled(network: Callable[[Tensor], Tensor], image: Tensor, tiling: Tiling) -> Tensor:
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
    tile_h, tile_w = (min(tiling.tile_size, tiling.round_up(length)) for length in (height, width))
    result: Tensor | None = None
    for top in range(0, max(1, height - tiling.offset), tile_h - tiling.offset):
        for left in range(0, max(1, width - tiling.offset), tile_w - tiling.offset):
            output = network(crop_reflect(image, top, left, (tile_h, tile_w), tiling.margin))
            if result is None:
                result = output.new_empty((*output.shape[:2], height, width))
            region = result[..., top : top + tile_h, left : left + tile_w]
            region.copy_(output[..., : region.shape[-2], : region.shape[-1]])
    assert result is not None
    return result


def crop_reflect(image: Tensor, top: int, left: int, size: tuple[int, int], margin: int) -> Tensor:
    """A piece of (N, C, H, W) that may reach beyond it: (N, C, size + margin), half of the margin on every side."""
    for dim, (first, length) in enumerate(zip((top, left), size, strict=True), start=2):
        index = torch.arange(first - margin // 2, first + length + margin - margin // 2, device=image.device)
        image = image.index_select(dim, reflect_index(index, torch.tensor(image.shape[dim], device=image.device)))
    return image
