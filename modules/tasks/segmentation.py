"""What the segmentation methods share: the weighted cross-entropy, and predictions for pictures of any size."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.errors import Refused
from datamodules.transforms.downsample import IGNORE
from modules.losses.precision import to_float32
from modules.tasks.tiling import Tiling, in_tiles
from modules.training.method import Batch, Method


class SegmentationMethod(Method, ABC):
    """A network that says of every pixel how likely each class is.

    Args:
        classes: how many.
        tiling: how it takes large pictures.
        symmetries: over how many of the eight symmetries of the square a prediction is averaged: 1, 4 (turns) or 8.
        images, learning_rate, seed: see `Method`.
    """

    def __init__(self, classes: int, tiling: Tiling, symmetries: int, images: int, learning_rate: float, seed: int = 0) -> None:
        super().__init__(images, learning_rate, seed=seed)
        if symmetries not in VIEWS:
            raise Refused(f"model.symmetries: {symmetries}; take {', '.join(map(str, VIEWS))}")
        self.classes, self.tiling, self.symmetries = classes, tiling, symmetries

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
            raise Refused(f"data.margin: {margin}, but this network takes away {self.tiling.margin}")
        logits, mask = self(batch["image"]), batch["mask"]
        entropy = F.cross_entropy(to_float32(logits), mask, ignore_index=IGNORE, reduction="none")
        return {"entropy": (entropy * batch["weight"] if "weight" in batch else entropy).mean()}

    def probabilities(self, image: Tensor) -> Tensor:
        """(N, classes, H, W) in [0, 1], mean over the symmetries, of a picture (N, C, H, W) of any size."""
        return in_tiles(self._mean_over_symmetries, image.to(self.dtype), self.tiling)

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The probabilities beside the truth; what they are worth, callbacks say."""
        return {**batch, "prediction": self.probabilities(batch["image"])}

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Each pixel's likeliest class, uint8 (N, H, W): no picture is too large for that."""

        def likeliest(tile: Tensor) -> Tensor:
            return self._mean_over_symmetries(tile).argmax(1, keepdim=True).to(torch.uint8)

        return {**batch, "prediction": in_tiles(likeliest, batch["image"].to(self.dtype), self.tiling)[:, 0]}

    def _mean_over_symmetries(self, tile: Tensor) -> Tensor:
        found = [
            symmetry(to_float32(self(symmetry(tile, view))), INVERSE.get(view, view)).softmax(1)
            for view in VIEWS[self.symmetries]
        ]
        return torch.stack(found).mean(0) if len(found) > 1 else found[0]


# The symmetries of the square in three bits: mirror rows, mirror columns, then transpose.
VIEWS = {1: (0,), 4: (0, 3, 5, 6), 8: tuple(range(8))}
INVERSE = {5: 6, 6: 5}  # quarter turns; all others are their own


def symmetry(image: Tensor, view: int) -> Tensor:
    """One of the eight symmetries of (..., H, W)."""
    mirrored = [dim for bit, dim in ((1, -2), (2, -1)) if view & bit]
    image = image.flip(mirrored) if mirrored else image
    return image.transpose(-2, -1) if view & 4 else image
