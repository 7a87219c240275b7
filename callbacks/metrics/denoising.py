"""PSNR of denoised and inpainted images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import PositiveFloat
from skimage.restoration import denoise_tv_chambolle

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError


class DenoisingPSNR(ImageMetric):
    """PSNR in dB of images in [0, 1], averaged over the images of a set.

    - `psnr/output`: the output of the network.
    - `psnr/input`: the corrupted input.
    - `psnr/tv-chambolle`: total-variation denoising (Chambolle, 2004; by scikit-image) with the best weight of `tv_weights`,
      chosen on the evaluated set itself, which favors this baseline.

    Required outputs: {"image", "input", "prediction": (N, C, H, W)}.

    Args:
        tv_weights: weights of the total-variation filter; empty to omit the filter, for example for inpainting.
        on_validation: evaluate at validations too.
    """

    set_protocols = ("psnr/tv-chambolle",)  # the weight of the filter is the best for all images
    required_outputs = ("image", "input", "prediction")

    def __init__(
        self, tv_weights: Sequence[PositiveFloat] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5), on_validation: bool = False
    ) -> None:
        super().__init__(on_validation)
        self.tv_weights = tv_weights

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Require a corrupted input.

        Raises:
            UserError: the model does not corrupt its input.
        """
        if getattr(pl_module, "corruption", "none") == "none":
            raise UserError("DenoisingPSNR: model.corruption is none. Choose a corruption, or remove this metric")

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, float]:
        """Return the PSNR of the output, of the input, and of the filter with each weight."""
        clean, noisy, restored = (
            outputs[name][i].float().cpu().double().permute(1, 2, 0).numpy() for name in ("image", "input", "prediction")
        )
        filtered = {
            f"tv/{weight}": psnr(clean, denoise_tv_chambolle(noisy, weight=weight, channel_axis=2))
            for weight in self.tv_weights
        }
        return {"output": psnr(clean, restored), "input": psnr(clean, noisy), **filtered}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        means = {name: float(np.mean([state[name] for state in states])) for name in states[0]}
        metrics = {f"psnr/{name}": means[name] for name in ("output", "input")}
        if self.tv_weights:
            metrics["psnr/tv-chambolle"] = max(value for name, value in means.items() if name.startswith("tv/"))
        return metrics


def psnr(clean: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB, at most 100, for values in [0, 1]."""
    return float(-10 * np.log10(max(np.square(clean - other).mean(), 1e-10)))
