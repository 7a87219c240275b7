"""Perceptual losses on the features of a fixed network.

J. Johnson, A. Alahi, L. Fei-Fei. Perceptual Losses for Real-Time Style Transfer and Super-Resolution. ECCV 2016.
arXiv:1603.08155, Section 3.2.

The paper and its released code differ. The style loss of the paper is the squared Frobenius norm of the difference of the Gram
matrices, summed over the C^2 entries. The code takes the mean over the entries, which is smaller by the factor C^2.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GramReduction = Literal["sum", "mean"]


def gram_matrix(features: Tensor) -> Tensor:
    """Compute Gram matrices G = psi psi^T / (C H W) of features (eq. 3): (N, C, H, W) to (N, C, C)."""
    psi = features.flatten(2).float()  # half precision overflows in the sum over pixels
    return psi @ psi.mT / features[0].numel()


def feature_loss(features: Tensor, targets: Tensor) -> Tensor:
    """Compute the feature reconstruction loss (eq. 2): the mean over C, H and W, and over the batch."""
    return F.mse_loss(features.float(), targets.float())


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
