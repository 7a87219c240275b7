"""Mode coverage of a generator on a mixture of Gaussians."""

from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import SampleSetMetric


class ModeCoverage(SampleSetMetric):
    """Number of covered modes and fraction of high-quality samples (Srivastava et al., VEEGAN, arXiv:1705.07761, Section 4).

    - `modes/3-sigma`: modes with at least one high-quality sample, within three standard deviations of its nearest center.
    - `modes/populated`: modes that are nearest to at least 1% of the samples, at any distance.
    - `high-quality/3-sigma`: fraction of high-quality samples.

    The predictions must be points (N, 2), and the reference set of the datamodule must contain the centers.

    Args:
        std: standard deviation of each Gaussian.
    """

    def __init__(self, std: float = 0.02) -> None:
        super().__init__(on_validation=True)
        self.std = std

    def update(self, images: Tensor) -> Tensor:
        """Return the points (N, 2) on the CPU."""
        return images.cpu()

    def compute(self, samples: Tensor, real: Tensor, trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        distance, nearest = torch.cdist(samples, real).min(dim=1)
        high_quality = distance < 3 * self.std
        populated = torch.bincount(nearest, minlength=len(real)) >= len(samples) / 100
        return {
            "modes/3-sigma": float(nearest[high_quality].unique().numel()),
            "modes/populated": float(populated.sum()),
            "high-quality/3-sigma": high_quality.double().mean().item(),
        }
