"""Overlap-tile strategy: predict images of any size tile by tile, in bounded memory.

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
    """Tile geometry of a network.

    Args:
        tile_size: side of an output tile in pixels.
        margin: input side minus output side in pixels, half of it on each side.
        stride: period of the network's translation equivariance in pixels.
        offset: valid output sides are a multiple of `stride` plus `offset`.

    Raises:
        UserError: `tile_size` is not a valid output side.
    """

    tile_size: int
    margin: int
    stride: int
    offset: int = 0

    def __post_init__(self) -> None:
        if self.tile_size < self.stride + self.offset or (self.tile_size - self.offset) % self.stride:
            nearest = self.round_up(max(self.tile_size, self.stride + self.offset))
            raise UserError(
                f"model.tile_size: {self.tile_size} is not {self.offset} plus a multiple of {self.stride}. Use {nearest}"
            )

    def round_up(self, length: int) -> int:
        """Return the smallest valid output side that covers `length`."""
        return max(1, -(-(length - self.offset) // self.stride)) * self.stride + self.offset


def predict_tiled(network: Callable[[Tensor], Tensor], image: Tensor, tiling: Tiling) -> Tensor:
    """Predict each pixel, tile by tile; images are reflected at the border.

    Tiles are aligned to the network's stride. If the margin covers the receptive field, as for U-Net, the result equals that
    of a single pass. Other networks have less context at tile borders.

    Args:
        network: function from (N, C, h + margin, w + margin) to (N, K, h, w).
        image: (N, C, H, W), of any size.
        tiling: tile geometry of the network.

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
    """Crop (N, C, H, W) to `size` plus half of `margin` on every side, with reflection beyond the border."""
    for dim, (first, length) in enumerate(zip((top, left), size, strict=True), start=2):
        index = torch.arange(first - margin // 2, first + length + margin - margin // 2, device=image.device)
        image = image.index_select(dim, reflect_index(index, torch.tensor(image.shape[dim], device=image.device)))
    return image
