"""Masks made visible: classes as colours over a picture, and where a prediction errs."""

import torch
from torch import Tensor

from datamodules.transforms.downsample import IGNORE

# Of the classes after the first, again and again. The first seven are distinct for the colour-blind (Okabe and Ito, 2008).
COLOURS = torch.tensor(
    [(0.90, 0.60, 0.00), (0.34, 0.71, 0.91), (0.00, 0.62, 0.45), (0.94, 0.89, 0.26), (0.00, 0.45, 0.70), (0.84, 0.37, 0.00),
     (0.80, 0.47, 0.65), (0.60, 0.60, 0.60), (0.55, 0.25, 0.60), (0.75, 0.90, 0.55), (0.45, 0.25, 0.10), (0.20, 0.20, 0.20),
     (1.00, 0.75, 0.75), (0.50, 0.00, 0.15), (0.00, 0.25, 0.20), (0.65, 0.55, 0.95), (0.35, 0.35, 0.00), (0.00, 0.90, 0.85),
     (0.95, 0.10, 0.55), (0.85, 0.80, 0.70)]
)  # fmt: skip
RED, BLUE, VIOLET = (torch.tensor(colour) for colour in ((0.9, 0.1, 0.1), (0.1, 0.3, 1.0), (0.7, 0.2, 0.9)))


def overlay(image: Tensor, mask: Tensor, strength: float = 0.55) -> Tensor:
    """A picture (1 or 3, H, W) in [0, 1] with its classes (H, W) in colours, all but class 0: (3, H, W) on the CPU."""
    image, mask = image.detach().float().cpu().expand(3, -1, -1), mask.cpu().long()
    shown = (mask != 0) & (mask != IGNORE)
    colours = COLOURS[(mask - 1).clamp(min=0) % len(COLOURS)].permute(2, 0, 1)
    return torch.where(shown, torch.lerp(image, colours, strength), image)


def mistakes(image: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """A pale picture with what is wrong: red where class 0 is taken for another, blue the reverse, violet all else."""
    shown = 0.5 + 0.5 * image.detach().float().cpu().mean(0, keepdim=True).expand(3, -1, -1)
    prediction, mask = prediction.cpu().long(), mask.cpu().long()
    wrong = (prediction != mask) & (mask != IGNORE)
    for where, colour in (
        (wrong & (mask == 0), RED),
        (wrong & (prediction == 0), BLUE),
        (wrong & (prediction * mask > 0), VIOLET),
    ):
        shown = torch.where(where, colour.view(3, 1, 1), shown)
    return shown


def row(image: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """Picture, truth, prediction and mistakes side by side: (1, 3, H, 4 W + 12)."""
    parts = [image.detach().float().cpu().expand(3, -1, -1), overlay(image, mask), overlay(image, prediction)]
    parts.append(mistakes(image, prediction, mask))
    gap = torch.ones(3, image.shape[-2], 4)
    return torch.cat([part for shown in parts for part in (shown, gap)][:-1], dim=2)[None]
