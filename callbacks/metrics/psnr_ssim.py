"""PSNR and SSIM of restored images, as named protocols."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError
from datamodules.transforms.color import luma


def psnr_y(prediction: Tensor, target: Tensor, crop_border: int) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, 10 log10(255**2 / MSE), of 8-bit luma without borders.

    The protocol is that of the SRCNN, ESPCN and SRGAN tables: clip, round to 8 bits, crop `crop_border` (the scale) pixels on
    each side. The mean over a dataset is the mean of the dB values. A perfect image has infinite PSNR.

    Args:
        prediction, target: luma (N, 1, H, W) or RGB (N, 3, H, W) in [0, 1].
        crop_border: width of the border in pixels.

    Returns:
        float64 (N,).
    """
    error = luma_levels(prediction, crop_border) - luma_levels(target, crop_border)
    return 10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3)))


def ssim_y(prediction: Tensor, target: Tensor, crop_border: int) -> Tensor:
    """Return the structural similarity of 8-bit luma without borders, as in ``ssim_index.m`` (Wang et al., 2004).

    The Gaussian window is 11 x 11 with sigma 1.5, K = (0.01, 0.03) and L = 255. The mean is over the windows inside the image
    (torchmetrics includes windows over a mirrored border).

    Args:
        prediction, target: luma (N, 1, H, W) or RGB (N, 3, H, W) in [0, 1], at least 11 pixels high and wide after cropping.
        crop_border: width of the border in pixels.

    Returns:
        float64 (N,).

    Raises:
        UserError: the cropped images are smaller than the window.
    """
    x, y = luma_levels(prediction, crop_border), luma_levels(target, crop_border)
    if min(x.shape[-2:]) < 11:
        raise UserError(
            f"crop_border: {x.shape[-1]}x{x.shape[-2]} pixels remain, but SSIM needs at least 11x11 pixels. Use larger images"
        )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y, xx, yy, xy = (_gaussian_filter(image) for image in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_filter(image: Tensor) -> Tensor:
    """Return the Gaussian-weighted mean of each 11 x 11 window in the image: (N, 1, H, W) to (N, 1, H - 10, W - 10)."""
    weights = torch.exp(-((torch.arange(11, dtype=image.dtype, device=image.device) - 5) ** 2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(image, weights.view(1, 1, 11, 1)), weights.view(1, 1, 1, 11))


def luma_levels(image: Tensor, crop_border: int) -> Tensor:
    """Return the 8-bit luma of images without borders, as float64 on the CPU, because not every device supports doubles.

    Args:
        image: luma (N, 1, H, W) or RGB (N, 3, H, W) in [0, 1]; it is clipped and rounded to 8 bits first.
        crop_border: width of the border in pixels.

    Returns:
        (N, 1, H - 2 * crop_border, W - 2 * crop_border), integers in 0 ... 255.
    """
    levels = (image.detach().cpu().double() * 255 + 0.5).floor().clamp(0, 255)
    if levels.shape[1] == 3:
        levels = torch.stack([luma(one) for one in levels.to(torch.uint8)]).double()
    return levels[..., crop_border : levels.shape[-2] - crop_border, crop_border : levels.shape[-1] - crop_border]


def protocols(crop_border: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the metrics by protocol name, for a border of `crop_border` pixels."""
    return {
        f"psnr-y/crop{crop_border}": partial(psnr_y, crop_border=crop_border),
        f"ssim-y/crop{crop_border}": partial(ssim_y, crop_border=crop_border),
    }


class PSNRSSIM(ImageMetric):
    """PSNR and SSIM of each validation and test image; the mean over a dataset is logged as `<dataset>/<protocol>`.

    Required outputs: {"prediction", "target"}, luma (N, 1, H, W) or RGB (N, 3, H, W) in [0, 1], with "name" and "dataset", N
    strings each.

    Args:
        crop_border: width of the cropped border in pixels, by convention the scale.
    """

    required_outputs = ("prediction", "target")

    def __init__(self, crop_border: int) -> None:
        super().__init__()
        self.protocols = protocols(crop_border)

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, float]:
        """Return the metrics of one image."""
        pair = outputs["prediction"][i : i + 1], outputs["target"][i : i + 1]
        return {name: metric(*pair).item() for name, metric in self.protocols.items()}

    def compute_images(self, states: dict[str, Any], trainer: Any) -> dict[str, dict[str, float]]:
        """Return the metrics of each image, which are its states."""
        return states
