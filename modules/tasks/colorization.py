"""Base class of colorization methods."""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.batches import ColorizationOutputs, PhotographEvalBatch
from datamodules.transforms.draw import image_row
from datamodules.transforms.lab import fit_gamut, lab_to_rgb, rgb_to_lab
from modules.training.method import Batch, Method

STRIDE = 8  # sides of the inputs of `predict_ab` are multiples of it
PREDICTION_PIXELS = 2**20  # of the network's input in `predict_step`, at most, before its sides are rounded
STRIP_PIXELS = 2**20  # of a strip in `predict_step`


class ColorizationMethod(Method, ABC):
    """Method that predicts a and b of Lab from L.

    Args:
        total_images, learning_rate, seed: see `Method`.
    """

    def __init__(self, total_images: int, learning_rate: float, seed: int = 0) -> None:
        super().__init__(total_images, learning_rate, seed=seed)
        self.prediction_side = 256  # shorter side of the network's input in `predict_step`, in pixels

    @abstractmethod
    def predict_ab(self, lightness: Tensor, batch: Batch) -> Tensor:
        """Predict a and b.

        Args:
            lightness: L in [0, 100], (N, 1, H, W); H and W are multiples of 8.
            batch: batch of the images, for their names and indices.

        Returns:
            (N, 2, H, W).
        """

    def validation_step(self, batch: PhotographEvalBatch, batch_idx: int) -> ColorizationOutputs:
        """Add the colorized photograph as "prediction", and its a and b as "ab"."""
        lightness = rgb_to_lab(batch["image"])[:, :1]
        ab = self.predict_ab(lightness, dict(batch))
        return {**batch, "prediction": add_color(lightness, ab), "ab": ab}

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Add the colorized photograph as "prediction": colors predicted at a low resolution, with the L of the input."""
        image = batch["image"]
        height, width = image.shape[-2:]
        factor = min(self.prediction_side / min(height, width), math.sqrt(PREDICTION_PIXELS / (height * width)))
        sides = [max(STRIDE, round(side * factor / STRIDE) * STRIDE) for side in (height, width)]
        small = F.interpolate(image, sides, mode="bilinear", antialias=True).clamp(0, 1)
        ab = self.predict_ab(rgb_to_lab(small)[:, :1], batch)
        ab = F.interpolate(ab, (height, width), mode="bilinear")
        rows = max(1, STRIP_PIXELS // width)
        strips = zip(image.split(rows, dim=-2), ab.split(rows, dim=-2), strict=True)
        prediction = torch.cat([add_color(rgb_to_lab(strip)[:, :1], colors) for strip, colors in strips], dim=-2)
        return {**batch, "prediction": prediction}

    preview_limit = 6

    def preview(self, outputs: Batch) -> Tensor:
        """Draw the photograph in gray, colorized, and in its own colors."""
        gray = rgb_to_lab(outputs["image"][:1])[:, :1]
        return image_row(add_color(gray, torch.zeros_like(outputs["ab"][:1])), outputs["prediction"][:1], outputs["image"][:1])


def add_color(lightness: Tensor, ab: Tensor) -> Tensor:
    """Return RGB images in [0, 1] from L (N, 1, H, W) and a and b (N, 2, H, W); see `fit_gamut` for colors outside of sRGB."""
    return lab_to_rgb(fit_gamut(torch.cat([lightness, ab.to(lightness)], dim=1)))
