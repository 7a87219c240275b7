"""The image transformation network on large images, in tiles.

The result equals that of a single pass up to rounding. Instance normalization requires the statistics of the whole image; they
are computed one layer after the other, each in a pass over all tiles. Only the residual blocks, at a quarter of the resolution,
process the whole image at once: their maps need about as much memory as the image.
"""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.networks.transform_net import PADDING, ConvNorm, StyleNorm, TransformNet, from_network_range, to_network_range

CONTEXT = 16  # pixels beyond a tile that its pixels depend on, at most, in the layers before or after the residual blocks
Span = tuple[slice, slice]  # of a tile along an axis: the pixels that it reads, and those that it computes


def transform_tiled(network: TransformNet, image: Tensor, mixture: Tensor, tile_size: int) -> Tensor:
    """Transform images (N, 3, H, W) in [0, 1] to the same shape, see `TransformNet.forward`.

    Args:
        network: network in evaluation mode.
        image: sides are multiples of 4 and at least 44 pixels.
        mixture: see `TransformNet.forward`.
        tile_size: side of a tile in pixels, a multiple of 4.
    """
    maps = to_network_range(F.pad(image, (PADDING,) * 4, mode="reflect"))
    try:
        maps = run_tiled(network.down, nn.Identity(), maps, mixture, tile_size, CONTEXT)
        for block in network.residuals:
            maps = block(maps, mixture)
        maps = run_tiled(network.up, network.head, maps, mixture, tile_size // 4, CONTEXT // 4)
    finally:
        for module in network.modules():
            if isinstance(module, StyleNorm):
                module.statistics = None
    return from_network_range(maps)


def run_tiled(
    layers: Iterable[nn.Module], last: nn.Module, maps: Tensor, mixture: Tensor, tile_size: int, context: int
) -> Tensor:
    """Apply layers, then the module `last`, in tiles: (N, C, H, W) to (N, C', scale H, scale W)."""
    before: list[ConvNorm] = []
    for layer in layers:
        assert isinstance(layer, ConvNorm)
        if isinstance(layer.norm.norm, nn.InstanceNorm2d):
            rows = computed_tiles(partial(run, before, layer.convolve, mixture), maps, tile_size, context)
            layer.norm.statistics = mean_and_variance(tile for row in rows for tile in row)
        before.append(layer)
    rows = computed_tiles(partial(run, before, last, mixture), maps, tile_size, context)
    return torch.cat([torch.cat(list(row), dim=3) for row in rows], dim=2)


def run(layers: Iterable[ConvNorm], last: Callable[[Tensor], Tensor], mixture: Tensor, maps: Tensor) -> Tensor:
    """Apply layers, then `last`, to (N, C, H, W)."""
    for layer in layers:
        maps = layer(maps, mixture)
    return last(maps)


def computed_tiles(
    function: Callable[[Tensor], Tensor], maps: Tensor, tile_size: int, context: int
) -> Iterator[Iterator[Tensor]]:
    """Yield the rows of tiles of `function(maps)`, without overlap."""
    for rows in spans(maps.shape[2], tile_size, context):
        yield (
            without_context(function(maps[..., rows[0], columns[0]]), rows, columns)
            for columns in spans(maps.shape[3], tile_size, context)
        )


def spans(length: int, tile_size: int, context: int) -> list[Span]:
    """Return the tiles along an axis."""
    starts = range(0, length, tile_size)
    return [
        (slice(max(0, start - context), min(length, start + tile_size + context)), slice(start, min(length, start + tile_size)))
        for start in starts
    ]


def without_context(tile: Tensor, rows: Span, columns: Span) -> Tensor:
    """Crop a tile, which may have another resolution than its spans, to the pixels that it computes."""
    for axis, (read, computed) in ((2, rows), (3, columns)):
        scale = Fraction(tile.shape[axis], read.stop - read.start)
        start, stop = ((position - read.start) * scale for position in (computed.start, computed.stop))
        tile = tile.narrow(axis, int(start), int(stop - start))
    return tile


def mean_and_variance(tiles: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the mean and the variance over all pixels of tiles (N, C, h, w): (N, C, 1, 1) each, at least float32."""
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    dtype = torch.float32
    for tile in tiles:
        values = tile.double()
        count += values[0, 0].numel()
        total = total.to(values) + values.sum((2, 3), keepdim=True)
        squares = squares.to(values) + values.square().sum((2, 3), keepdim=True)
        dtype = torch.promote_types(tile.dtype, torch.float32)
    mean = total / count
    return mean.to(dtype), (squares / count - mean.square()).clamp(min=0).to(dtype)
