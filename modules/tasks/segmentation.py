"""What the segmentation methods share: the weighted cross-entropy, and predictions for pictures of any size."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.errors import UserError
from datamodules.transforms.downsample import IGNORE_INDEX
from modules.losses.precision import to_float32
from modules.tasks.tiling import Tiling, predict_tiled
from modules.training.method import Batch, Method


class SegmentationMethod(Method, ABC):
    """A network that says of every pixel how likely each class is.

    Args:
        classes: how many.
        tiling: how it takes large pictures.
        tta_views: over how many of the eight symmetries of the square a prediction is averaged: 1, 4 (turns) or 8.
        total_images, learning_rate, seed: see `Method`.
    """

    def __init__(
        self, classes: int, tiling: Tiling, tta_views: int, total_images: int, learning_rate: float, seed: int = 0
    ) -> None:
        super().__init__(total_images, learning_rate, seed=seed)
        if tta_views not in TTA_VIEWS:
            raise UserError(f"model.tta_views: {tta_views}; take {', '.join(map(str, TTA_VIEWS))}")
        self.classes, self.tiling, self.tta_views = classes, tiling, tta_views

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, classes, H - margin, W - margin) of images (N, C, H, W) in [0, 1]."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the mask (N, H, W), each pixel by its "weight" where the batch has one; see U-Net, eq. 1.

        The mean is over all pixels, those that do not count included: then each part of a batch weighs what it holds.

        Raises:
            Refused: the mask is not of the size that the network predicts.
        """
        margin = batch["image"].shape[-1] - batch["mask"].shape[-1]
        if margin != self.tiling.margin:
            raise UserError(f"data.margin: {margin}, but this network takes away {self.tiling.margin}")
        logits, mask = self(batch["image"]), batch["mask"]
        cross_entropy = F.cross_entropy(to_float32(logits), mask, ignore_index=IGNORE_INDEX, reduction="none")
        return {"entropy": (cross_entropy * batch["weight"] if "weight" in batch else cross_entropy).mean()}

    def probabilities(self, image: Tensor) -> Tensor:
        """(N, classes, H, W) in [0, 1], mean over the symmetries, of a picture (N, C, H, W) of any size."""
        return predict_tiled(self._mean_over_symmetries, image.to(self.dtype), self.tiling)

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The probabilities beside the truth; what they are worth, callbacks say."""
        return {**batch, "prediction": self.probabilities(batch["image"])}

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Each pixel's likeliest class, uint8 (N, H, W): no picture is too large for that."""

        def argmax_tile(tile: Tensor) -> Tensor:
            return self._mean_over_symmetries(tile).argmax(1, keepdim=True).to(torch.uint8)

        return {**batch, "prediction": predict_tiled(argmax_tile, batch["image"].to(self.dtype), self.tiling)[:, 0]}

    def _mean_over_symmetries(self, tile: Tensor) -> Tensor:
        probs = [
            apply_dihedral(to_float32(self(apply_dihedral(tile, view))), INVERSE.get(view, view)).softmax(1)
            for view in TTA_VIEWS[self.tta_views]
        ]
        return torch.stack(probs).mean(0) if len(probs) > 1 else probs[0]


# The symmetries of the square in three bits: mirror rows, mirror columns, then transpose.
TTA_VIEWS = {1: (0,), 4: (0, 3, 5, 6), 8: tuple(range(8))}
INVERSE = {5: 6, 6: 5}  # quarter turns; all others are their own


def apply_dihedral(image: Tensor, view: int) -> Tensor:
    """One of the eight symmetries of (..., H, W)."""
    flipped = [dim for bit, dim in ((1, -2), (2, -1)) if view & bit]
    image = image.flip(flipped) if flipped else image
    return image.transpose(-2, -1) if view & 4 else image
