"""Base class of methods that stylize photographs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.batches import PhotographEvalBatch, StylizationOutputs
from datamodules.errors import UserError
from datamodules.transforms.draw import image_row
from datamodules.transforms.to_device import to_device_async
from modules.training.method import Batch, Method


class StylizationMethod(Method, ABC):
    """Method that transforms photographs of any size to one of several styles, or to a mixture of styles.

    Args:
        style_names: names of the styles.
        total_images, learning_rate, warmup, seed: see `Method`.

    Attributes:
        stride: the network accepts sides that are multiples of it.
        min_side: smallest side of an image in pixels.
    """

    stride = 4
    min_side = 1

    def __init__(self, style_names: list[str], total_images: int, learning_rate: float, warmup: int = 0, seed: int = 0) -> None:
        super().__init__(total_images, learning_rate, warmup, seed)
        self.style_names = style_names
        self.mixture, self.alpha = [1.0] + [0.0] * (len(style_names) - 1), 1.0  # of predictions

    @abstractmethod
    def forward(self, image: Tensor, mixture: Tensor) -> Tensor:
        """Transform (N, 3, H, W) in [0, 1] to the same shape; sides are multiples of `stride`.

        Args:
            image: photographs.
            mixture: weights of the styles of each photograph, (N, number of styles).
        """

    @abstractmethod
    def objective(self, image: Tensor, prediction: Tensor, mixture: Tensor) -> dict[str, Tensor]:
        """Compute the weighted loss terms of stylized photographs (N, 3, H, W), by name; a scalar each."""

    def mixture_of(self, style_ids: Sequence[int]) -> Tensor:
        """Return the mixtures of single styles, (N, number of styles)."""
        rows = [[float(style == i) for i in range(len(self.style_names))] for style in style_ids]
        return to_device_async(rows, self.device).to(self.dtype)

    def stylize(self, image: Tensor, mixture: Tensor) -> Tensor:
        """Transform images (N, 3, H, W) in [0, 1] of any size: pad them at the right and the bottom, then crop the result."""
        height, width = image.shape[-2:]
        padding = (0, -width % self.stride, 0, -height % self.stride)
        return self(F.pad(image.to(self.dtype), padding, mode="reflect"), mixture)[..., :height, :width]

    def validation_step(self, batch: PhotographEvalBatch, batch_idx: int) -> StylizationOutputs:
        """Add the photograph in one of the styles, in turn, as "prediction", and the name of the style as "style"."""
        style_ids = [i % len(self.style_names) for i in batch["index"].tolist()]
        prediction = self.stylize(batch["image"], self.mixture_of(style_ids)).clamp(0, 1)
        return {**batch, "style": [self.style_names[i] for i in style_ids], "prediction": prediction}

    test_step = validation_step

    def select(self, style: str | None, alpha: float) -> None:
        """Select the style of predictions.

        Args:
            style: name of a style; weights of several styles, such as "wave=0.7,the_scream=0.3"; or None for the first style.
            alpha: weight of the stylized photograph in the output, in [0, 1]; the rest is the photograph.

        Raises:
            UserError: a style does not exist, or a weight is not a number.
        """
        weights = {self.style_names[0]: 1.0} if style is None else parse_mixture(style, self.style_names)
        self.mixture = [weights.get(name, 0.0) / sum(weights.values()) for name in self.style_names]
        self.alpha = alpha

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Add the photograph in the selected style as "prediction"."""
        mixture = torch.tensor([self.mixture]).to(self.device).to(self.dtype)
        stylized = self.stylize(batch["image"], mixture).clamp(0, 1)
        return {**batch, "prediction": self.alpha * stylized + (1 - self.alpha) * batch["image"]}

    preview_limit = 2

    def preview_group(self, outputs: Batch) -> str:
        """Return the style, so that all styles have the same number of previews."""
        return str(outputs["style"][0])

    def preview(self, outputs: Batch) -> Tensor:
        """Draw the photograph and the stylized photograph."""
        return image_row(outputs["image"][:1], outputs["prediction"][:1])

    def train_mixture(self, batch: Batch) -> Tensor:
        """Return the mixtures of a training batch: the styles in turn, by the positions of the samples."""
        return self.mixture_of([sample_id % len(self.style_names) for sample_id in batch["sample_ids"]])


def parse_mixture(text: str, style_names: list[str]) -> dict[str, float]:
    """Return the weights of the styles in a text such as "wave=0.7,the_scream=0.3".

    A name without a weight has the weight 1.

    Raises:
        UserError: a style does not exist or is repeated, a weight is not a number or negative, or all weights are zero.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = (word.strip() for word in part.partition("="))
        if name in weights:
            raise UserError(f"--style: '{name}' is repeated. Give each style once")
        if name not in style_names:
            raise UserError(f"--style: no style '{name}'. Use one of: {', '.join(style_names)}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(f"--style: '{weight}' is not a number. Use, for example, {name}=0.5") from None
        if not 0 <= weights[name] < math.inf:
            raise UserError(f"--style: {name}={weight} is negative or not finite. Use, for example, {name}=0.5")
    if not 0 < sum(weights.values()) < math.inf:
        raise UserError(
            f"--style: the weights of '{text}' have a sum of zero or infinity. Use, for example, {style_names[0]}=0.5"
        )
    return weights
