"""Base class of segmentation methods: weighted cross-entropy, and predictions for images of any size."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from datamodules.batches import SegmentationEvalBatch, SegmentationOutputs
from datamodules.errors import UserError
from datamodules.transforms.downsample import IGNORE_INDEX
from datamodules.transforms.overlays import comparison_row
from modules.losses.precision import to_float32
from modules.networks.deterministic import cross_entropy
from modules.tasks.tiling import Tiling, predict_tiled
from modules.training.method import Batch, Method


class SegmentationMethod(Method, ABC):
    """Method that predicts the probability of each class at every pixel.

    Args:
        num_classes: number of classes.
        tiling: tiling of large images.
        tta_views: number of symmetries of the square over which predictions are averaged: 1, 4 (rotations) or 8.
        total_images, learning_rate, seed: see `Method`.

    Raises:
        UserError: `tta_views` is not 1, 4 or 8.
    """

    def __init__(
        self, num_classes: int, tiling: Tiling, tta_views: int, total_images: int, learning_rate: float, seed: int = 0
    ) -> None:
        super().__init__(total_images, learning_rate, seed=seed)
        if tta_views not in TTA_VIEWS:
            raise UserError(f"model.tta_views: {tta_views} is not valid. Use one of {', '.join(map(str, TTA_VIEWS))}")
        self.num_classes, self.tiling, self.tta_views = num_classes, tiling, tta_views

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Compute logits (N, num_classes, H - margin, W - margin) from images (N, C, H, W) in [0, 1]."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the cross-entropy with the mask (N, H, W), as "cross_entropy" (U-Net, eq. 1).

        Pixels are weighted by "weight" (N, H, W) if it is present. The mean is over all pixels, including ignored ones, so that
        micro-batches have equal weights.

        Raises:
            UserError: the mask does not have the size of the prediction.
        """
        margin = batch["image"].shape[-1] - batch["mask"].shape[-1]
        if margin != self.tiling.margin:
            raise UserError(f"data.margin: {margin} does not fit this network. Use {self.tiling.margin}")
        logits, mask = self(batch["image"]), batch["mask"]
        entropy = cross_entropy(to_float32(logits), mask, IGNORE_INDEX)
        return {"cross_entropy": (entropy * batch["weight"] if "weight" in batch else entropy).mean()}

    def probabilities(self, image: Tensor) -> Tensor:
        """Compute class probabilities (N, num_classes, H, W) of images (N, C, H, W) of any size, averaged over symmetries."""
        return predict_tiled(self._mean_over_symmetries, image.to(self.dtype), self.tiling)

    def validation_step(self, batch: SegmentationEvalBatch, batch_idx: int) -> SegmentationOutputs:
        """Add the class probabilities as "prediction"; callbacks compute the metrics."""
        return {**batch, "prediction": self.probabilities(batch["image"])}

    test_step = validation_step

    preview_limit = 3

    def preview(self, outputs: Batch) -> Tensor:
        """Draw the image, the true mask, the prediction and the errors."""
        return comparison_row(outputs["image"][0], outputs["prediction"][0].argmax(0), outputs["mask"][0])

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Add the most probable class of each pixel, uint8 (N, H, W), as "prediction"; probabilities would need more memory."""

        def argmax_tile(tile: Tensor) -> Tensor:
            return self._mean_over_symmetries(tile).argmax(1, keepdim=True).to(torch.uint8)

        images = batch["image"].to(self.dtype).split(1)  # the pages of a stack, one at a time, to bound the memory
        return {**batch, "prediction": torch.cat([predict_tiled(argmax_tile, image, self.tiling)[:, 0] for image in images])}

    def _mean_over_symmetries(self, tile: Tensor) -> Tensor:
        probs = [
            apply_dihedral(to_float32(self(apply_dihedral(tile, view))), INVERSE.get(view, view)).softmax(1)
            for view in TTA_VIEWS[self.tta_views]
        ]
        return torch.stack(probs).mean(0) if len(probs) > 1 else probs[0]


# Symmetries of the square as three bits: flip rows, flip columns, then transpose.
TTA_VIEWS = {1: (0,), 4: (0, 3, 5, 6), 8: tuple(range(8))}
INVERSE = {5: 6, 6: 5}  # quarter rotations; all others are their own inverse


def apply_dihedral(image: Tensor, view: int) -> Tensor:
    """Apply one of the eight symmetries of the square to (..., H, W)."""
    flipped = [dim for bit, dim in ((1, -2), (2, -1)) if view & bit]
    image = image.flip(flipped) if flipped else image
    return image.transpose(-2, -1) if view & 4 else image
