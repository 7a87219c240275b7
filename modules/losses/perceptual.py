"""Perceptual losses on the features of a fixed network.

J. Johnson, A. Alahi, L. Fei-Fei. Perceptual Losses for Real-Time Style Transfer and Super-Resolution. ECCV 2016.
arXiv:1603.08155, Section 3.2.

The paper and its released code differ. The style loss of the paper is the squared Frobenius norm of the difference of the Gram
matrices, summed over the C^2 entries. The code takes the mean over the entries, which is smaller by the factor C^2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.losses.precision import to_float32

GramReduction = Literal["sum", "mean"]


def gram_matrix(features: Tensor) -> Tensor:
    """Compute Gram matrices G = psi psi^T / (C H W) of features (eq. 3): (N, C, H, W) to (N, C, C)."""
    psi = to_float32(features.flatten(2))  # half precision overflows in the sum over pixels
    return psi @ psi.mT / features[0].numel()


def feature_loss(features: Tensor, targets: Tensor) -> Tensor:
    """Compute the feature reconstruction loss (eq. 2): the mean over C, H and W, and over the batch."""
    return F.mse_loss(to_float32(features), to_float32(targets))


def style_loss(features: Mapping[str, Tensor], target_grams: Mapping[str, Tensor], reduction: GramReduction) -> Tensor:
    """Compute the style reconstruction loss (eq. 4), summed over layers, mean over the batch.

    Args:
        features: layer name -> (N, C, H, W).
        target_grams: layer name -> (N or 1, C, C).
        reduction: "sum" over the entries of the matrices, as in the paper, or "mean", as in its code.
    """
    losses = []
    for layer, target in target_grams.items():
        squares = (gram_matrix(features[layer]) - target).square()
        losses.append((squares.sum((1, 2)) if reduction == "sum" else squares.mean((1, 2))).mean())
    return torch.stack(losses).sum()


def total_variation(image: Tensor) -> Tensor:
    """Compute the sum of the squared differences of neighboring pixels, mean over the batch: (N, C, H, W) to a scalar."""
    vertical = (image[..., 1:, :] - image[..., :-1, :]).square().flatten(1).sum(1)
    horizontal = (image[..., 1:] - image[..., :-1]).square().flatten(1).sum(1)
    return (vertical + horizontal).mean()


@dataclass(frozen=True)
class PerceptualObjective:
    """Weighted sum of the content, style and total variation losses (eq. 5).

    Args:
        features: function from images (N, 3, H, W) in [0, 1] and layer names to features by layer name.
        content_layer: layer of the feature reconstruction loss.
        style_layers: layers of the style reconstruction loss.
        content_weight, style_weight, tv_weight: weights of the losses.
        gram: see `style_loss`.
    """

    features: Callable[[Tensor, Sequence[str]], dict[str, Tensor]]
    content_layer: str
    style_layers: Sequence[str]
    content_weight: float
    style_weight: float
    tv_weight: float
    gram: GramReduction

    def style_targets(self, style: Tensor) -> dict[str, Tensor]:
        """Compute the Gram matrices of style images (N, 3, H, W), by layer: (N, C, C)."""
        with torch.no_grad():
            return {layer: gram_matrix(maps) for layer, maps in self.features(style, self.style_layers).items()}

    def content_targets(self, image: Tensor) -> Tensor:
        """Compute the content features of photographs (N, 3, H, W): (N, C, h, w)."""
        with torch.no_grad():
            return self.features(image, [self.content_layer])[self.content_layer]

    def terms(self, prediction: Tensor, content: Tensor, grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the weighted losses of stylized photographs (N, 3, H, W), by name.

        Args:
            prediction: stylized photographs.
            content: see `content_targets`.
            grams: see `style_targets`; (N or 1, C, C).
        """
        features = self.features(prediction, [self.content_layer, *self.style_layers])
        with torch.autocast(prediction.device.type, enabled=False):
            return {
                "content": self.content_weight * feature_loss(features[self.content_layer], content),
                "style": self.style_weight * style_loss(features, grams, self.gram),
                "total_variation": self.tv_weight * total_variation(to_float32(prediction)),
            }
