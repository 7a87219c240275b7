"""Sliced Wasserstein distance between the patches of generated and of real images, the protocol of ProGAN."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.metrics.base import SampleSetMetric, to_uint8
from datamodules.errors import UserError

PATCH = 7  # pixels
PATCHES_PER_IMAGE = 128  # of each image at each level
DIRECTIONS = 512
MIN_RESOLUTION = 16  # pixels of the last level
BINOMIAL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


class SlicedWasserstein(SampleSetMetric):
    """Karras et al., arXiv:1710.10196, Section 5: 1000 times the distance at each level of a Laplacian pyramid, and their mean.

    At each level 128 patches of 7 x 7 pixels an image, of as many images as both sets have, are standardised by colour within
    their set, projected onto 512 random directions, and sorted; the distance is the mean difference of the sorted values (W1).
    Logged as `swd/<side of the level>-<images>` and `swd/mean-<images>`. The paper's figures have 16,384 images.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse images that cannot be halved to 16 pixels, before anything is made."""
        side = trainer.datamodule.size
        while side > MIN_RESOLUTION and side % 2 == 0:
            side //= 2
        if side != MIN_RESOLUTION:
            raise UserError(f"data.size: {trainer.datamodule.size}; the sliced Wasserstein distance needs 16, 32, 64, ...")

    def update(self, images: Tensor) -> Tensor:
        """All of them, as files hold them: uint8 (N, C, H, W)."""
        return to_uint8(images).cpu()

    def compute(self, samples: Tensor, real: Tensor, trainer: Any) -> dict[str, float]:
        """See the class."""
        count = min(len(samples), len(real))
        device = trainer.strategy.root_device
        distances = sliced_wasserstein(samples[:count].to(device), real[:count].to(device))
        figures = {f"swd/{side}-{count}": 1000 * distance for side, distance in distances.items()}
        return {**figures, f"swd/mean-{count}": sum(figures.values()) / len(figures)}


def sliced_wasserstein(samples: Tensor, real: Tensor, at_once: int = 64) -> dict[int, float]:
    """The distance at each level, by its side in pixels.

    Args:
        samples, reference_sets: uint8 (N, C, H, H), as many of each.
        at_once: images that are taken apart together.
    """
    generator = torch.Generator().manual_seed(0)
    patches = [sample_patches(images, at_once, generator) for images in (samples, real)]
    distances = {}
    for side in patches[0]:
        a, b = (normalize_patches(of_set[side]) for of_set in patches)
        directions = torch.randn(a.shape[1], DIRECTIONS, generator=generator).to(a)
        directions /= directions.norm(dim=0)
        parts = [
            ((a @ part).sort(dim=0).values - (b @ part).sort(dim=0).values).abs().mean(dim=0)
            for part in directions.split(16, dim=1)
        ]
        distances[side] = torch.cat(parts).mean().item()
    return distances


def sample_patches(images: Tensor, at_once: int, generator: torch.Generator) -> dict[int, Tensor]:
    """Random patches of images at each level: (N * PATCHES, C, PATCH, PATCH) by the level's side."""
    found: dict[int, list[Tensor]] = {}
    for part in images.split(at_once):
        for level in laplacian_pyramid(part.float()):
            side = level.shape[-1]
            corners = torch.randint(side - PATCH + 1, (2, len(part), PATCHES_PER_IMAGE), generator=generator).to(level.device)
            reach = torch.arange(PATCH, device=level.device)
            rows = (corners[0, :, :, None] + reach)[:, :, :, None]  # (n, PATCHES, PATCH, 1)
            columns = (corners[1, :, :, None] + reach)[:, :, None, :]
            which = torch.arange(len(part), device=level.device)[:, None, None, None]
            cut = level.permute(0, 2, 3, 1)[which, rows, columns]  # (n, PATCHES, PATCH, PATCH, C)
            found.setdefault(side, []).append(cut.flatten(0, 1).permute(0, 3, 1, 2))
    return {side: torch.cat(cuts) for side, cuts in found.items()}


def normalize_patches(patches: Tensor) -> Tensor:
    """Patches (M, C, h, w) with mean 0 and deviation 1 in each colour: (M, C h w)."""
    deviation, mean = torch.std_mean(patches, dim=(0, 2, 3), keepdim=True, correction=0)
    return ((patches - mean) / deviation).flatten(1)


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """What each halving of images (N, C, H, H) loses, and at last what is left: Burt and Adelson, 1983."""
    levels = []
    while images.shape[-1] > MIN_RESOLUTION:
        downsample_image = pyr_down(images)
        levels.append(images - pyr_up(downsample_image))
        images = downsample_image
    return [*levels, images]


def pyr_down(images: Tensor) -> Tensor:
    """Blurred binomially over mirrored borders, every second pixel."""
    return _blurred(images)[..., ::2, ::2]


def pyr_up(images: Tensor) -> Tensor:
    """The pixels with zeros between, blurred, and brightened as much as the zeros have darkened them."""
    spread = images.new_zeros(*images.shape[:2], 2 * images.shape[2], 2 * images.shape[3])
    spread[..., ::2, ::2] = images
    return 4 * _blurred(spread)


def _blurred(images: Tensor) -> Tensor:
    kernel = BINOMIAL.to(images)
    flat = F.pad(images.flatten(0, 1).unsqueeze(1), (2, 2, 2, 2), mode="reflect")
    blurred = F.conv2d(F.conv2d(flat, kernel.view(1, 1, 5, 1)), kernel.view(1, 1, 1, 5))
    return blurred.view(images.shape)
