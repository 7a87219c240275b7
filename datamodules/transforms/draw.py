"""Drawings of images, samples and points for previews: images (1, 3, H, W) in [0, 1] on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

PREVIEW_IMAGES = 64  # images in a preview
PADDING = 2  # pixels between the images of a grid


def image_row(*panels: Tensor) -> Tensor:
    """Join panels (1, C, H, W), such as input, prediction and target, from left to right."""
    return torch.cat([panel.float().expand(-1, 3, -1, -1) for panel in panels], dim=3).clamp(0, 1).cpu()


def image_grid(images: Tensor) -> Tensor:
    """Arrange images (N, C, H, W) in a nearly square grid."""
    columns = max(1, round(len(images) ** 0.5))
    return make_grid(images.float().clamp(0, 1).cpu(), nrow=columns, padding=PADDING, pad_value=1.0)[None]


def split_grid(grid: Tensor, side: int) -> Tensor:
    """Return the images of a grid (C, H, W) of square images, the inverse of `image_grid`: (N, C, side, side)."""
    if grid.shape[-1] == side:  # `make_grid` returns a single image without a border
        return grid[None]
    step = side + PADDING
    cells = grid[:, PADDING:, PADDING:].unfold(1, side, step).unfold(2, side, step)  # (C, rows, columns, side, side)
    images = cells.permute(1, 2, 0, 3, 4).flatten(0, 1)
    last = (images < 1).flatten(1).any(1).nonzero().max()  # the last row may have white cells
    return images[: last + 1]


def stack_rows(*rows: Tensor) -> Tensor:
    """Stack rows of images (N, C, H, W), such as images and reconstructions."""
    images = torch.stack([row.float().clamp(0, 1).cpu() for row in rows])
    return make_grid(images.flatten(0, 1), nrow=images.shape[1], padding=PADDING, pad_value=1.0)[None]


def scatter_plot(points: Tensor, real: Tensor, side: int = 360) -> Tensor:
    """Plot points (N, 2) in red over real points in gray, with the origin in the center."""
    points, real = points.float().cpu(), real.float().cpu()
    extent = 1.2 * torch.cat([points, real]).abs().max().clamp(min=1e-6)
    image = torch.ones(3, side, side)
    for group, color in ((real, (0.7, 0.7, 0.7)), (points, (0.8, 0.1, 0.1))):
        columns, rows = ((group * torch.tensor([1, -1]) / extent + 1) / 2 * (side - 2)).long().T
        for dy in (0, 1):
            for dx in (0, 1):
                image[:, rows + dy, columns + dx] = torch.tensor(color)[:, None]
    return image[None]


def contour_plot(value: Tensor, real: Tensor, points: Tensor, levels: int = 14, side: int = 360) -> Tensor:
    """Draw the level sets of a function as bands, and real points (N, 2) in orange and points (N, 2) in green over them.

    Args:
        value: values on a grid (H, W) that covers 1.2 times the extent of `real`; the first row is at the top.
        real, points: points.
        levels: number of bands, each with the same number of grid positions.
        side: height and width of the image.
    """
    values = F.interpolate(value.float().cpu()[None, None], (side, side), mode="bilinear")[0, 0]
    bounds = values.flatten().quantile(torch.linspace(0, 1, levels + 1)[1:-1])
    band = torch.bucketize(values, bounds) / (levels - 1)  # 0 for the smallest values, 1 for the largest
    dark, light = torch.tensor([0.13, 0.22, 0.45]), torch.tensor([0.93, 0.95, 0.98])
    image = dark[:, None, None] + (light - dark)[:, None, None] * band
    extent = 1.2 * real.float().abs().max().clamp(min=1e-6).cpu()
    for group, color in ((real, (0.95, 0.55, 0.1)), (points, (0.1, 0.65, 0.2))):
        inside = group.float().cpu()
        inside = inside[(inside.abs() < extent).all(1)]
        columns, rows = ((inside * torch.tensor([1, -1]) / extent + 1) / 2 * (side - 2)).long().T
        for dy in (0, 1):
            for dx in (0, 1):
                image[:, rows + dy, columns + dx] = torch.tensor(color)[:, None]
    return image[None]
