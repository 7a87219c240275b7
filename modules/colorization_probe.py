"""Linear classification of the features of a colorization network.

R. Zhang, P. Isola, A. A. Efros. Colorful Image Colorization. ECCV 2016. arXiv:1603.08511. Section 3.2.

Differences from the paper, with reasons:

1. The features are those of the network of Section 2. The paper trains an AlexNet on colorization for this experiment.
2. Optimizer, budget and number of features: the paper refers to other work. Adam does not depend on the scale of the features.
"""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.batches import ClassificationOutputs, PhotographEvalBatch
from datamodules.errors import UserError
from datamodules.io.paths import file_hash, find_file
from datamodules.transforms.lab import rgb_to_lab
from modules.colorization import colorization_network, load_network, scale_lightness
from modules.losses.precision import to_float32
from modules.training.method import Batch, Method

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")  # blocks of the network
STRIDES = (2, 4, 8, 8, 8)  # of their outputs
WIDTHS = (1, 2, 4, 8, 8)  # channels of their outputs, in units of the width of the network


class ColorizationProbe(Method):
    """Section 3.2: a linear classifier on each of conv1 ... conv5 of a frozen colorization network.

    The features of a layer are the outputs of its block, averaged over the cells of a square grid, of which no layer has more
    than `n_features`. The input is the lightness.

    Args:
        weights: checkpoint or weights file of a colorization network, see `find_file`; null for random weights ("Gaussian").
        n_classes: number of classes.
        size: side of the images in pixels; a multiple of 8.
        base_channels, affine: of the colorization network, see `ColorfulColorization`.
        n_features: largest number of features of a layer.
        total_images: training budget.
        learning_rate: Adam learning rate at the start.
    """

    def __init__(
        self,
        weights: str | None = None,
        n_classes: PositiveInt = 1000,
        size: PositiveInt = 224,
        base_channels: PositiveInt = 64,
        affine: bool = False,
        n_features: PositiveInt = 9_000,
        total_images: int = 12_800_000,
        learning_rate: PositiveFloat = 1e-3,
    ) -> None:
        super().__init__(total_images, learning_rate)
        self.save_hyperparameters()
        self.weights, self.n_classes = weights, n_classes
        self.weights_hash = ""  # sha256 of the file
        self.network = colorization_network(base_channels, 2, affine)[: len(LAYERS)].eval().requires_grad_(False)
        channels = [base_channels * width for width in WIDTHS]
        self.sides = [min(math.isqrt(n_features // n), size // stride) for n, stride in zip(channels, STRIDES, strict=True)]
        if not all(self.sides):
            raise UserError(f"model.n_features: {n_features} is less than the {max(channels)} channels of conv5. Use more")
        self.classifiers = nn.ModuleList(
            nn.Linear(n * side**2, n_classes) for n, side in zip(channels, self.sides, strict=True)
        )

    def train(self, mode: bool = True) -> Self:
        """Set the mode of training; the network keeps its statistics of batch normalization."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, lightness: Tensor) -> Tensor:
        """Compute the logits of the layers from L (N, 1, H, W) in [0, 100]: (N, 5, K)."""
        maps, logits = scale_lightness(lightness), []
        for block, side, classifier in zip(self.network, self.sides, self.classifiers, strict=True):
            maps = block(maps)
            logits.append(classifier(F.adaptive_avg_pool2d(maps, side).flatten(1)))
        return torch.stack(logits, dim=1)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the cross entropy of each layer's classifier."""
        logits = to_float32(self(rgb_to_lab(batch["image"])[:, :1]))
        return {name: F.cross_entropy(logits[:, i], batch["label"]) for i, name in enumerate(LAYERS)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create Adam; see difference 2 above."""
        return torch.optim.Adam(self.classifiers.parameters(), self.learning_rate, fused=True)

    def validation_step(self, batch: PhotographEvalBatch, batch_idx: int) -> ClassificationOutputs:
        """Add the logits of each layer's classifier as "logits"."""
        logits = to_float32(self(rgb_to_lab(batch["image"])[:, :1].to(self.dtype)))
        return {**batch, "logits": dict(zip(LAYERS, logits.unbind(1), strict=True))}

    test_step = validation_step

    def setup(self, stage: str) -> None:
        """Load the colorization network before training.

        Raises:
            UserError: the weights are missing, or belong to another network.
        """
        super().setup(stage)
        if stage == "fit" and self.weights is not None:
            path = find_file(self.weights, "model.weights")
            load_network(self.network, path)
            self.weights_hash = file_hash(path)

    def file_hashes(self) -> dict[str, str]:
        """Return the hash of the colorization network's file."""
        return {**super().file_hashes(), **({"colorization network": self.weights_hash} if self.weights else {})}

    def inspect_data(self, data: Any) -> None:
        """Compare the number of classes with that of the training photographs.

        Raises:
            UserError: they differ.
        """
        found = data.train_class_count()
        if found != self.n_classes:
            raise UserError(f"model.n_classes: {self.n_classes}, but {data.train} has {found} classes. Use {found}")
