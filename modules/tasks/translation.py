"""What methods share that translate pictures of one domain, A, into another, B, and perhaps back."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from modules.training.method import Method

Direction = Literal["AtoB", "BtoA"]


class TranslationMethod(Method, ABC):
    """A method that makes a picture of the other domain from one of any size.

    Its networks halve sides; `stride` is what they must be a multiple of.
    """

    stride = 4

    @abstractmethod
    def forward(self, image: Tensor, direction: Direction = "AtoB") -> Tensor:
        """(N, 3, H, W) in [0, 1], sides multiples of `stride` and at least twice that, to the same of the other domain."""

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """The same for sides of any length: mirrored on at the right and the bottom, and cut again."""
        height, width = image.shape[-2:]
        padding = [max(2 * self.stride, side + -side % self.stride) - side for side in (width, height)]
        mode = "reflect" if min(height, width) > self.stride else "replicate"
        return self(F.pad(image.to(self.dtype), (0, padding[0], 0, padding[1]), mode=mode), direction)[..., :height, :width]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """A picture's translation, what comes back of it, and what its own domain's generator makes of it."""
        direction: Direction = batch["direction"][0]
        reverse: Direction = "BtoA" if direction == "AtoB" else "AtoB"
        translation = self.translate(batch["image"], direction)
        return {
            **batch,
            "prediction": translation,
            "reconstruction": self.translate(translation, reverse),
            "same": self.translate(batch["image"], reverse),
        }

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The translation alone."""
        return {**batch, "prediction": self.translate(batch["image"], batch["direction"][0])}
