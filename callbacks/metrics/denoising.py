"""Restoration: how near to the sound picture is what a network makes of a corrupted one?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import PositiveFloat
from skimage.restoration import denoise_tv_chambolle

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError


class DenoisingPSNR(ImageMetric):
    """PSNR in dB of pixels in [0, 1], of each picture over all its pixels, and the mean over a set.

    - `psnr/output`: of what the network makes.
    - `psnr/input`: of what it is given.
    - `psnr/tv-chambolle`: of total-variation denoising (Chambolle, 2004; scikit-image's) with the one weight of `tv_weights` that
      is best for the set that is measured, which flatters it.

    Expects the outputs {"image", "input", "prediction": (N, C, H, W)}.

    Args:
        tv_weights: of the classical filter; none to leave it away, as where pixels are missing.
        on_validation: measure at validations too.
    """

    def __init__(
        self, tv_weights: Sequence[PositiveFloat] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5), on_validation: bool = False
    ) -> None:
        super().__init__(on_validation)
        self.tv_weights = tv_weights

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a network that is given sound pictures, before the first step."""
        if getattr(pl_module, "corruption", "none") == "none":
            raise UserError("Restoration: model.corruption is none; there is nothing to restore")

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, float]:
        """The picture's figures, those of the filter by its weight."""
        clean, noisy, restored = (
            outputs[name][i].float().cpu().double().permute(1, 2, 0).numpy() for name in ("image", "input", "prediction")
        )
        filtered = {
            f"tv/{weight}": psnr(clean, denoise_tv_chambolle(noisy, weight=weight, channel_axis=2))
            for weight in self.tv_weights
        }
        return {"output": psnr(clean, restored), "input": psnr(clean, noisy), **filtered}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """See the class."""
        means = {name: float(np.mean([one[name] for one in states])) for name in states[0]}
        found = {f"psnr/{name}": means[name] for name in ("output", "input")}
        if self.tv_weights:
            found["psnr/tv-chambolle"] = max(value for name, value in means.items() if name.startswith("tv/"))
        return found


def psnr(clean: np.ndarray, other: np.ndarray) -> float:
    """In dB, for values in [0, 1]."""
    return float(-10 * np.log10(max(np.square(clean - other).mean(), 1e-10)))
