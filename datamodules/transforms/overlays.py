"""Visualization of segmentation masks: class colors over an image, and prediction errors."""

import torch
from torch import Tensor

from datamodules.transforms.downsample import IGNORE_INDEX

# Colors of classes 1, 2, ..., repeated cyclically. The first seven are distinct to color-blind readers (Okabe and Ito, 2008).
COLORS = torch.tensor(
    [(0.90, 0.60, 0.00), (0.34, 0.71, 0.91), (0.00, 0.62, 0.45), (0.94, 0.89, 0.26), (0.00, 0.45, 0.70), (0.84, 0.37, 0.00),
     (0.80, 0.47, 0.65), (0.60, 0.60, 0.60), (0.55, 0.25, 0.60), (0.75, 0.90, 0.55), (0.45, 0.25, 0.10), (0.20, 0.20, 0.20),
     (1.00, 0.75, 0.75), (0.50, 0.00, 0.15), (0.00, 0.25, 0.20), (0.65, 0.55, 0.95), (0.35, 0.35, 0.00), (0.00, 0.90, 0.85),
     (0.95, 0.10, 0.55), (0.85, 0.80, 0.70)]
)  # fmt: skip
RED, BLUE, VIOLET = (torch.tensor(color) for color in ((0.9, 0.1, 0.1), (0.1, 0.3, 1.0), (0.7, 0.2, 0.9)))


def overlay(image: Tensor, mask: Tensor, strength: float = 0.55, colors: Tensor = COLORS) -> Tensor:
    """Overlay an image with the colors of its classes, except class 0 and ignored pixels.

    Args:
        image: (1 or 3, H, W) in [0, 1].
        mask: class ids (H, W).
        strength: weight of the colors, from 0 to 1.
        colors: color of the classes 1, 2, ..., (N, 3) in [0, 1], repeated cyclically.

    Returns:
        (3, H, W) in [0, 1] on the CPU.
    """
    image, mask = image.detach().float().cpu().expand(3, -1, -1), mask.cpu().long()
    colored = (mask != 0) & (mask != IGNORE_INDEX)
    drawn = colors[(mask - 1).clamp(min=0) % len(colors)].permute(2, 0, 1)
    return torch.where(colored, torch.lerp(image, drawn, strength), image)


def error_overlay(image: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """Color the errors of a prediction on a pale gray image: (3, H, W) in [0, 1] on the CPU.

    False positives are red, false negatives blue, and confusions of two classes violet. Class 0 is the background.
    """
    canvas = 0.5 + 0.5 * image.detach().float().cpu().mean(0, keepdim=True).expand(3, -1, -1)
    prediction, mask = prediction.cpu().long(), mask.cpu().long()
    wrong = (prediction != mask) & (mask != IGNORE_INDEX)
    for region, color in (
        (wrong & (mask == 0), RED),
        (wrong & (prediction == 0), BLUE),
        (wrong & (prediction * mask > 0), VIOLET),
    ):
        canvas = torch.where(region, color.view(3, 1, 1), canvas)
    return canvas


def comparison_row(image: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """Concatenate image, ground truth, prediction and errors horizontally: (1, 3, H, 4 W + 12) in [0, 1]."""
    panels = [image.detach().float().cpu().expand(3, -1, -1), overlay(image, mask), overlay(image, prediction)]
    panels.append(error_overlay(image, prediction, mask))
    gap = torch.ones(3, image.shape[-2], 4)
    return torch.cat([part for panel in panels for part in (panel, gap)][:-1], dim=2)[None]
