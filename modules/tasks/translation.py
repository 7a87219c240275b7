"""Base class of methods that translate images between two domains, A and B."""

from abc import ABC, abstractmethod
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor

from datamodules.batches import TranslationOutputs, UnpairedEvalBatch
from datamodules.transforms.draw import image_row
from modules.training.method import Method

Direction = Literal["AtoB", "BtoA"]


class TranslationMethod(Method, ABC):
    """Method that translates images of any size.

    Attributes:
        stride: the networks accept sides that are multiples of it.
    """

    stride = 4

    @abstractmethod
    def forward(self, image: Tensor, direction: Direction = "AtoB") -> Tensor:
        """Translate (N, 3, H, W) in [0, 1] to the same shape; sides are multiples of `stride` and at least twice that."""

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images (N, 3, H, W) in [0, 1] of any size: pad them at the right and the bottom, then crop the result.

        The padding is by reflection, or by replication if a side is at most `stride`.
        """
        height, width = image.shape[-2:]
        padding = [max(2 * self.stride, side + -side % self.stride) - side for side in (width, height)]
        mode = "reflect" if min(height, width) > self.stride else "replicate"
        return self(F.pad(image.to(self.dtype), (0, padding[0], 0, padding[1]), mode=mode), direction)[..., :height, :width]

    def validation_step(self, batch: UnpairedEvalBatch, batch_idx: int) -> TranslationOutputs:
        """Add the translation as "prediction", its translation back as "reconstruction", and "identity".

        The identity mapping is the translation of the image to its own domain.
        """
        direction = cast(Direction, batch["direction"][0])
        reverse: Direction = "BtoA" if direction == "AtoB" else "AtoB"
        translation = self.translate(batch["image"], direction)
        return {
            **batch,
            "prediction": translation,
            "reconstruction": self.translate(translation, reverse),
            "identity": self.translate(batch["image"], reverse),
        }

    test_step = validation_step

    preview_limit = 3

    def preview_group(self, outputs: dict[str, Any]) -> str:
        """Return the direction, so that both directions have the same number of previews."""
        return outputs["direction"][0]

    def preview(self, outputs: dict[str, Any]) -> Tensor:
        """Draw the image, the translation and the reconstruction."""
        return image_row(*(outputs[name][:1] for name in ("image", "prediction", "reconstruction")))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Add the translation as "prediction"."""
        return {**batch, "prediction": self.translate(batch["image"], batch["direction"][0])}
