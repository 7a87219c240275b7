"""Multi-scale SSIM between generated images, a measure of their diversity, by the protocol of ProGAN."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from callbacks.metrics.base import SampleSetMetric, to_uint8
from datamodules.io.image_set import random_order

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # per scale, finest first
WINDOW, SIGMA = 11, 1.5


class MultiScaleSSIM(SampleSetMetric):
    """Mean MS-SSIM (Wang et al., 2003) of disjoint pairs of samples: 0 and 1, 2 and 3, ...; lower values mean more diversity.

    Odena et al., arXiv:1610.09585, in ProGAN's version (Karras et al., arXiv:1710.10196, Section 5). It is
    logged as `ms-ssim/<pairs>-pairs`, and `ms-ssim-real/<pairs>-pairs` for random pairs of real images.

    Args:
        pairs: number of pairs, at most; 10,000 in the paper.
        on_validation: see `SampleSetMetric`.
    """

    def __init__(self, pairs: PositiveInt = 10_000, on_validation: bool = False) -> None:
        super().__init__(on_validation, 2 * pairs)

    def update(self, images: Tensor) -> Tensor:
        """Return the images as uint8 (N, C, H, W)."""
        return to_uint8(images).cpu()

    def compute(self, samples: Tensor, real: Tensor, trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        values = {}
        for name, images in (("ms-ssim", samples), ("ms-ssim-real", real[random_order(len(real))[: len(samples)]])):
            pairs = len(images) // 2
            chunks = (chunk.to(trainer.strategy.root_device) for chunk in images[: 2 * pairs].split(128))
            similarities = torch.cat([ms_ssim(chunk[0::2], chunk[1::2]) for chunk in chunks])
            values[f"{name}/{pairs}-pairs"] = similarities.mean().item()
        return values


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the MS-SSIM of each pair of 8-bit images (N, C, H, W): float64 (N,).

    Contrast and structure are compared at five scales, each half the size of the previous one, and luminance at the last scale.
    The windows are inside the image: 11 x 11, or smaller if the image is smaller. The result is the product of the means,
    clamped at 0 and raised to the power of their weights.
    """
    x, y = x.double(), y.double()
    product = x.new_ones(len(x))
    for i, weight in enumerate(WEIGHTS):
        similarity, contrast = ssim(x, y)
        product *= (similarity if i == len(WEIGHTS) - 1 else contrast).clamp(min=0) ** weight
        x, y = (F.avg_pool2d(image, 2, ceil_mode=True) for image in (x, y))
    return product


def ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean SSIM and its mean contrast-and-structure term of pairs of 8-bit images (N, C, H, W): (N,) each."""
    size = min(WINDOW, *x.shape[-2:])
    sigma = SIGMA * size / WINDOW
    offsets = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    window = window / window.sum()

    def mean(image: Tensor) -> Tensor:
        flat = image.flatten(0, 1).unsqueeze(1)
        weighted = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return weighted.view(*image.shape[:2], *weighted.shape[-2:])

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, covariance = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    contrast = (2 * covariance + c2) / (vx + vy + c2)
    luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    return (luminance * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))
