"""Bicubic upscaling, the baseline of super-resolution tables: MATLAB's `imresize` in floating point."""

from torch import Tensor

from datamodules.transforms.resize import imresize
from modules.tasks.superresolution import SuperResolutionMethod


class Bicubic(SuperResolutionMethod):
    """Baseline without training; `darkroom test bicubic/x3` evaluates it.

    Args:
        scale: integer scale factor.
    """

    def __init__(self, scale: int = 3) -> None:
        super().__init__(scale, total_images=1, learning_rate=0.0)
        self.save_hyperparameters()

    def forward(self, lr_image: Tensor) -> Tensor:
        """Upscale luma (N, 1, h, w) in [0, 1] to (N, 1, h * scale, w * scale), without clipping."""
        height, width = lr_image.shape[-2:]
        return imresize(lr_image, (height * self.scale, width * self.scale))
