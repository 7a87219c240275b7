"""How many modes of a ring of Gaussians a generator covers."""

from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import SampleSetMetric


class ModeCoverage(SampleSetMetric):
    """Modes covered, and the share of samples of high quality (Srivastava et al., VEEGAN, arXiv:1705.07761, Section 4).

    A sample is of high quality within three deviations of its nearest centre; a mode is covered if it has such a sample. A
    mode has a crowd if it is the nearest one of at least a hundredth of the samples, however far they are.

    Expects points (N, 2) as predictions, and of the datamodule the centres as its real set.

    Args:
        deviation: of each Gaussian.
    """

    def __init__(self, deviation: float = 0.02) -> None:
        super().__init__(on_validation=True)
        self.deviation = deviation

    def update(self, images: Tensor) -> Tensor:
        """The points."""
        return images.cpu()

    def compute(self, samples: Tensor, real: Tensor, trainer: Any) -> dict[str, float]:
        """See the class."""
        distance, nearest = torch.cdist(samples, real).min(dim=1)
        good = distance < 3 * self.deviation
        populated = torch.bincount(nearest, minlength=len(real)) >= len(samples) / 100
        return {
            "modes/3-sigma": float(nearest[good].unique().numel()),
            "modes/populated": float(populated.sum()),
            "high-quality/3-sigma": good.double().mean().item(),
        }
