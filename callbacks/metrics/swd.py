"""Sliced Wasserstein distance between patches of generated and real images, by the protocol of ProGAN."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from callbacks.metrics.base import SampleSetMetric, to_uint8
from datamodules.errors import UserError
from datamodules.io.image_set import random_order

PATCH = 7  # pixels
PATCHES_PER_IMAGE = 128  # per level
DIRECTIONS = 512
MIN_RESOLUTION = 16  # side of the last level in pixels
BINOMIAL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


class SlicedWasserstein(SampleSetMetric):
    """Sliced Wasserstein distance, times 1000, at each level of a Laplacian pyramid, and the mean over the levels.

    Karras et al., arXiv:1710.10196, Section 5. At each level, 128 patches of 7 x 7 pixels per image are normalized per channel
    within their set. They are projected onto 512 random directions and sorted. The distance is the mean absolute difference of
    the sorted values (W1). Both sets have the same number of images: a random subset of the larger one. The metric is logged as
    `swd/<size of the level>-<images>` and `swd/mean-<images>`.

    Args:
        images: number of images of each set, at most; 16,384 in the paper.
        split_half: also compute the distance between two random disjoint halves of the real images, as a reference, logged as
            `swd-split-half/...`.
        flip_real: flip every second real image left to right, for networks that are trained with random flips.
        on_validation: see `SampleSetMetric`.
    """

    def __init__(
        self, images: PositiveInt = 16_384, split_half: bool = False, flip_real: bool = False, on_validation: bool = False
    ) -> None:
        super().__init__(on_validation, images)
        self.split_half, self.flip_real = split_half, flip_real

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Require images that can be halved to 16 pixels.

        Raises:
            UserError: the size is not 16 times a power of 2, or the data have no images of one size.
        """
        side = getattr(trainer.datamodule, "size", None)
        if not isinstance(side, int):
            raise UserError(
                f"SlicedWasserstein: {type(trainer.datamodule).__name__} has no images of one size. "
                "Remove the metric from trainer.callbacks"
            )
        while side > MIN_RESOLUTION and side % 2 == 0:
            side //= 2
        if side != MIN_RESOLUTION:
            raise UserError(
                f"data.size: {trainer.datamodule.size} is not valid for the sliced Wasserstein distance. "
                "Use 16, 32, 64 or a higher power of 2"
            )

    def update(self, images: Tensor) -> Tensor:
        """Return the images as uint8 (N, C, H, W)."""
        return to_uint8(images).cpu()

    def compute(self, samples: Tensor, real: Tensor, trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        order, half = random_order(len(real)), min(self.max_samples or len(real), len(real) // 2)
        count = min(len(samples), len(real))
        sets = {"swd": (samples[:count], self._select(real, order[:count]))}
        if self.split_half:
            sets["swd-split-half"] = self._select(real, order[:half]), self._select(real, order[half : 2 * half])
        results: dict[str, float] = {}
        for name, (left, right) in sets.items():
            distances = sliced_wasserstein(left, right, device=trainer.strategy.root_device)
            values = {f"{name}/{side}-{len(left)}": 1000 * distance for side, distance in distances.items()}
            results |= {**values, f"{name}/mean-{len(left)}": sum(values.values()) / len(values)}
        return results

    def _select(self, real: Tensor, items: Tensor) -> Tensor:
        """Return real images in the order of their set; every second one is flipped, if requested."""
        selected = real[items.sort().values]
        if self.flip_real:
            selected[1::2] = selected[1::2].flip(3)
        return selected


def sliced_wasserstein(
    samples: Tensor, real: Tensor, batch_size: int = 64, device: torch.device | None = None
) -> dict[int, float]:
    """Return the distance at each level, by its size in pixels.

    Args:
        samples, real: uint8 (N, C, H, H), the same number of each.
        batch_size: images per pyramid computation.
        device: device of the computation, by default that of the images.
    """
    generator = torch.Generator().manual_seed(0)
    patches = [sample_patches(images, batch_size, generator, device) for images in (samples, real)]
    distances = {}
    for side in patches[0]:
        a, b = (normalize_patches(set_patches[side]) for set_patches in patches)
        directions = torch.randn(a.shape[1], DIRECTIONS, generator=generator).to(a)
        directions /= directions.norm(dim=0)
        parts = [
            ((a @ chunk).sort(dim=0).values - (b @ chunk).sort(dim=0).values).abs().mean(dim=0)
            for chunk in directions.split(16, dim=1)
        ]
        distances[side] = torch.cat(parts).mean().item()
    return distances


def sample_patches(
    images: Tensor, batch_size: int, generator: torch.Generator, device: torch.device | None = None
) -> dict[int, Tensor]:
    """Sample random patches of images at each level: (N * PATCHES_PER_IMAGE, C, PATCH, PATCH) by size of the level."""
    patches_by_side: dict[int, list[Tensor]] = {}
    for chunk in images.split(batch_size):
        for level in laplacian_pyramid(chunk.to(device).float()):
            side = level.shape[-1]
            corners = torch.randint(side - PATCH + 1, (2, len(chunk), PATCHES_PER_IMAGE), generator=generator).to(level.device)
            offsets = torch.arange(PATCH, device=level.device)
            rows = (corners[0, :, :, None] + offsets)[:, :, :, None]  # (n, PATCHES_PER_IMAGE, PATCH, 1)
            columns = (corners[1, :, :, None] + offsets)[:, :, None, :]
            image_indices = torch.arange(len(chunk), device=level.device)[:, None, None, None]
            sampled = level.permute(0, 2, 3, 1)[image_indices, rows, columns]  # (n, PATCHES_PER_IMAGE, PATCH, PATCH, C)
            patches_by_side.setdefault(side, []).append(sampled.flatten(0, 1).permute(0, 3, 1, 2))
    return {side: torch.cat(level_patches) for side, level_patches in patches_by_side.items()}


def normalize_patches(patches: Tensor) -> Tensor:
    """Normalize patches (M, C, h, w) to mean 0 and standard deviation 1 in each channel: (M, C h w)."""
    std, mean = torch.std_mean(patches, dim=(0, 2, 3), keepdim=True, correction=0)
    return ((patches - mean) / std).flatten(1)


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Return the Laplacian pyramid of images (N, C, H, H), finest level first (Burt and Adelson, 1983)."""
    levels = []
    while images.shape[-1] > MIN_RESOLUTION:
        half_size = pyr_down(images)
        levels.append(images - pyr_up(half_size))
        images = half_size
    return [*levels, images]


def pyr_down(images: Tensor) -> Tensor:
    """Blur with a binomial kernel over mirrored borders and keep every second pixel."""
    return _blur(images)[..., ::2, ::2]


def pyr_up(images: Tensor) -> Tensor:
    """Insert zeros between the pixels, blur, and multiply by 4 to keep the mean."""
    upsampled = images.new_zeros(*images.shape[:2], 2 * images.shape[2], 2 * images.shape[3])
    upsampled[..., ::2, ::2] = images
    return 4 * _blur(upsampled)


def _blur(images: Tensor) -> Tensor:
    kernel = BINOMIAL.to(images)
    flat = F.pad(images.flatten(0, 1).unsqueeze(1), (2, 2, 2, 2), mode="reflect")
    blurred = F.conv2d(F.conv2d(flat, kernel.view(1, 1, 5, 1)), kernel.view(1, 1, 1, 5))
    return blurred.view(images.shape)
