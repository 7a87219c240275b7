"""Metrics of colorized photographs."""

from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric, to_uint8
from datamodules.transforms.ab_bins import BINS, nearest_bins, rebalancing_weights, smooth
from datamodules.transforms.lab import rgb_to_lab

MAX_ERROR = 150.0  # largest threshold of the error curve, in Lab units
MAX_PSNR = 100.0  # of equal images, in dB; a single different level in 256 x 256 pixels gives 101


class ColorMetrics(ImageMetric):
    """Error curve, PSNR and colorfulness of colorized photographs.

    - `auc/raw`: area under the curve of the share of pixels whose Euclidean error in a and b is below a threshold, for
      thresholds of 0 ... 150, in percent of its maximum (Zhang et al., arXiv:1603.08511, Section 3.1). The colors are those of
      the network, which may be outside of sRGB.
    - `auc/rebalanced`: the same, with pixels weighted inversely to the frequency of their true color (eq. 4 with lambda = 0).
      The frequencies are those of the dataset, smoothed as in the paper. The paper uses those of ImageNet.
    - `psnr-rgb`, `psnr-lab`: PSNR of the 8-bit images in dB: in RGB with a peak of 1, and in Lab with a peak of 100; mean over
      the images, of which each has at most 100 dB.
    - `colorfulness`, `colorfulness-real`: colorfulness of the 8-bit images and of the photographs (Hasler and Suesstrunk, 2003,
      M3); mean over the images.

    Required outputs: {"image", "prediction": (N, 3, H, W), "ab": (N, 2, H, W)}.

    Args:
        on_validation: evaluate at validations too, otherwise only at tests.
    """

    set_protocols = ("auc/rebalanced",)  # its weights are those of all images
    required_outputs = ("image", "prediction", "ab")

    def update(self, outputs: dict[str, Any], i: int) -> tuple[Tensor, Tensor, list[float]]:
        """Return the number of pixels and the sum of their areas by true color, (313,) each, and the metrics of the image."""
        image = outputs["image"][i].double()  # 8-bit levels
        prediction = to_uint8(outputs["prediction"][i].double()).double() / 255
        lab, predicted_lab = rgb_to_lab(image), rgb_to_lab(prediction)
        error = (outputs["ab"][i].double() - lab[1:]).norm(dim=0).flatten()
        area = (1 - error / MAX_ERROR).clamp(min=0)  # of the curve of one pixel: a step from 0 to 1 at its error
        bins = nearest_bins(lab[1:].flatten(1).T, 1)[0][:, 0]
        counts = torch.bincount(bins, minlength=len(BINS)).double()
        areas = torch.zeros_like(counts).index_add_(0, bins, area)
        values = [
            psnr(prediction, image, 1.0),
            psnr(predicted_lab, lab, 100.0),
            colorfulness(prediction),
            colorfulness(image),
        ]
        return counts.cpu(), areas.cpu(), values

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        counts, areas = (torch.stack([state[part] for state in states]).sum(0) for part in (0, 1))
        weights = rebalancing_weights(smooth(counts), uniform_weight=0.0)
        means = torch.tensor([values for _, _, values in states], dtype=torch.float64).mean(0).tolist()
        return {
            "auc/raw": 100 * float(areas.sum() / counts.sum()),
            "auc/rebalanced": 100 * float((weights * areas).sum() / (weights * counts).sum()),
            **dict(zip(("psnr-rgb", "psnr-lab", "colorfulness", "colorfulness-real"), means, strict=True)),
        }


def psnr(prediction: Tensor, target: Tensor, peak: float) -> float:
    """Return the PSNR in dB of tensors of one shape, at most `MAX_PSNR`."""
    return min(MAX_PSNR, float(10 * torch.log10(peak**2 / (prediction - target).square().mean())))


def colorfulness(image: Tensor) -> float:
    """Return the colorfulness M3 of an RGB image (3, H, W) in [0, 1]: 0 for gray images, about 30 for photographs."""
    red, green, blue = 255 * image
    opponents = torch.stack([red - green, (red + green) / 2 - blue]).flatten(1)
    return float(opponents.std(1, correction=0).norm() + 0.3 * opponents.mean(1).norm())
