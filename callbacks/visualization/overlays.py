"""Masks made visible: classes as colours over a picture, and where a prediction errs."""

import torch
from torch import Tensor

from datamodules.transforms.downsample import IGNORE_INDEX

# Of the classes after the first, again and again. The first seven are distinct for the colour-blind (Okabe and Ito, 2008).
COLORS = torch.tensor(
    [(0.90, 0.60, 0.00), (0.34, 0.71, 0.91), (0.00, 0.62, 0.45), (0.94, 0.89, 0.26), (0.00, 0.45, 0.70), (0.84, 0.37, 0.00),
     (0.80, 0.47, 0.65), (0.60, 0.60, 0.60), (0.55, 0.25, 0.60), (0.75, 0.90, 0.55), (0.45, 0.25, 0.10), (0.20, 0.20, 0.20),
     (1.00, 0.75, 0.75), (0.50, 0.00, 0.15), (0.00, 0.25, 0.20), (0.65, 0.55, 0.95), (0.35, 0.35, 0.00), (0.00, 0.90, 0.85),
     (0.95, 0.10, 0.55), (0.85, 0.80, 0.70)]
)  # fmt: skip
RED, BLUE, VIOLET = (torch.tensor(colour) for colour in ((0.9, 0.1, 0.1), (0.1, 0.3, 1.0), (0.7, 0.2, 0.9)))


def overlay(image: Tensor, mask: Tensor, strength: float = 0.55) -> Tensor:
    """A picture (1 or 3, H, W) in [0, 1] with its classes (H, W) in colours, all but class 0: (3, H, W) on the CPU."""
    image, mask = image.detach().float().cpu().expand(3, -1, -1), mask.cpu().long()
    canvas = (mask != 0) & (mask != IGNORE_INDEX)
    colours = COLORS[(mask - 1).clamp(min=0) % len(COLORS)].permute(2, 0, 1)
    return torch.where(canvas, torch.lerp(image, colours, strength), image)


def error_overlay(image: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """A pale picture with what is wrong: red where class 0 is taken for another, blue the reverse, violet all else."""
    canvas = 0.5 + 0.5 * image.detach().float().cpu().mean(0, keepdim=True).expand(3, -1, -1)
    prediction, mask = prediction.cpu().long(), mask.cpu().long()
    wrong = (prediction != mask) & (mask != IGNORE_INDEX)
    for where, colour in (
        (wrong & (mask == 0), RED),
        (wrong & (prediction == 0), BLUE),
        (wrong & (prediction * mask > 0), VIOLET),
    ):
        canvas = torch.where(where, colour.view(3, 1, 1), canvas)
    return canvas


def comparison_row(image: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """Picture, truth, prediction and mistakes side by side: (1, 3, H, 4 W + 12)."""
    parts = [image.detach().float().cpu().expand(3, -1, -1), overlay(image, mask), overlay(image, prediction)]
    parts.append(error_overlay(image, prediction, mask))
    gap = torch.ones(3, image.shape[-2], 4)
    return torch.cat([part for canvas in parts for part in (canvas, gap)][:-1], dim=2)[None]
