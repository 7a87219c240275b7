"""Colorization without training: the rows "Gray" and "Random" of Zhang et al., arXiv:1603.08511, Table 1."""

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.errors import UserError
from datamodules.random.noise import uniform
from datamodules.transforms.lab import rgb_to_lab
from modules.tasks.colorization import ColorizationMethod
from modules.training.lightning_compat import datamodule
from modules.training.method import Batch


class GrayColorization(ColorizationMethod):
    """No colors: a = b = 0."""

    def __init__(self) -> None:
        super().__init__(total_images=1, learning_rate=0.0)
        self.save_hyperparameters()

    def forward(self, lightness: Tensor) -> Tensor:
        """Return zeros, (N, 1, H, W) to (N, 2, H, W)."""
        return torch.zeros_like(lightness).expand(-1, 2, -1, -1)

    def predict_ab(self, lightness: Tensor, batch: Batch) -> Tensor:
        """See `forward`."""
        return self(lightness)


class RandomColorization(ColorizationMethod):
    """The colors of a random training photograph.

    Args:
        seed: seed of the choice.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(total_images=1, learning_rate=0.0, seed=seed)
        self.save_hyperparameters()

    def predict_ab(self, lightness: Tensor, batch: Batch) -> Tensor:
        """Return the colors of the photograph that belongs to the index of the image.

        Raises:
            UserError: the image is a user's, and has no index.
        """
        if "index" not in batch:
            raise UserError("predict: random colors are a baseline of the tables. Use darkroom test, or another recipe")
        position = float(uniform(self.seed, "colors", batch["index"].tolist(), 1)[0, 0])
        source = datamodule(self.trainer).training_crop(position)[None].to(lightness.device) / 255
        return F.interpolate(rgb_to_lab(source)[:, 1:], lightness.shape[-2:], mode="bilinear")
