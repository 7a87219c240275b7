"""PSNR and SSIM of restored pictures, as named protocols."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError


def psnr_y(prediction: Tensor, target: Tensor, crop_border: int) -> Tensor:
    """Peak signal-to-noise ratio in dB: 10 log10(255**2 / MSE) over 8-bit luma, borders left out.

    The setting of the SRCNN, ESPCN and SRGAN tables: clip, round to 8 bits, drop `crop_border` (the scale) pixels on every side;
    the mean over a data set is that of the dB values. A perfect picture has infinity.

    Args:
        prediction, target: (N, 1, H, W) in [0, 1].
        crop_border: pixels.

    Returns:
        float64 (N,).
    """
    error = _uint8_levels(prediction, crop_border) - _uint8_levels(target, crop_border)
    return 10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3)))


def ssim_y(prediction: Tensor, target: Tensor, crop_border: int) -> Tensor:
    """Structural similarity (Wang et al., 2004) of 8-bit luma as their ``ssim_index.m`` computes it, borders left out.

    11 x 11 Gaussian window with sigma 1.5, K = (0.01, 0.03), L = 255; only windows that lie wholly inside count
    (torchmetrics counts windows over a mirrored border too).

    Args:
        prediction, target: (N, 1, H, W) in [0, 1], at least 11 pixels high and wide after shaving.
        crop_border: pixels.

    Returns:
        float64 (N,).
    """
    x, y = _uint8_levels(prediction, crop_border), _uint8_levels(target, crop_border)
    if min(x.shape[-2:]) < 11:
        raise UserError(f"SSIM needs 11x11 pixels within the shaved border, not {x.shape[-1]}x{x.shape[-2]}")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y, xx, yy, xy = (_gaussian_filter(image) for image in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_filter(image: Tensor) -> Tensor:
    """Weighted mean over each 11 x 11 Gaussian window that lies inside: (N, 1, H, W) to (N, 1, H - 10, W - 10)."""
    weights = torch.exp(-((torch.arange(11, dtype=image.dtype, device=image.device) - 5) ** 2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(image, weights.view(1, 1, 11, 1)), weights.view(1, 1, 1, 11))


def _uint8_levels(image: Tensor, crop_border: int) -> Tensor:
    """8-bit levels as float64, shaved; on the CPU, since not every device has double precision."""
    levels = (image.detach().cpu().double() * 255 + 0.5).floor().clamp(0, 255)
    return levels[..., crop_border : levels.shape[-2] - crop_border, crop_border : levels.shape[-1] - crop_border]


def protocols(crop_border: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The measures by their protocol's name, for a border of `crop_border` pixels."""
    return {
        f"psnr-y/crop{crop_border}": partial(psnr_y, crop_border=crop_border),
        f"ssim-y/crop{crop_border}": partial(ssim_y, crop_border=crop_border),
    }


class PSNRSSIM(ImageMetric):
    """PSNR and SSIM of each validation and test image; logs the mean of each dataset as `<dataset>/<protocol>`.

    Expects the outputs {"prediction", "target"}, (N, 1, H, W) in [0, 1], with "name" and "dataset", N strings each.

    Args:
        crop_border: border in pixels that is left out, by custom the scale.
    """

    def __init__(self, crop_border: int) -> None:
        super().__init__()
        self.protocols = protocols(crop_border)

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, float]:
        """The metrics of one image."""
        pair = outputs["prediction"][i : i + 1], outputs["target"][i : i + 1]
        return {name: metric(*pair).item() for name, metric in self.protocols.items()}

    def compute_images(self, states: dict[str, Any], trainer: Any) -> dict[str, dict[str, float]]:
        """Each image has metrics of its own."""
        return states
