"""Convert label maps to color images and back with the datasets' palettes."""

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import UserError
from datamodules.transforms.downsample import IGNORE_INDEX

VOID = (0, 0, 0)  # color of ignored pixels
# Colors in the order of the class ids. CamVid: SegNet's colors; Cityscapes: the official colors of its 19 evaluation classes.
PALETTES = {
    "camvid": [(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
               (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)],
    "cityscapes": [(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
                   (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
                   (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)],
}  # fmt: skip


def palette(name: str) -> np.ndarray:
    """Return the colors of a dataset's classes: uint8 (classes, 3).

    Raises:
        UserError: the dataset has no palette.
    """
    if name not in PALETTES:
        raise UserError(f"{name} has no palette. Use a dataset with a palette: {', '.join(PALETTES)}")
    return np.array(PALETTES[name], dtype=np.uint8)


def colorize(mask: np.ndarray, colors: np.ndarray) -> Tensor:
    """Color a map of class ids (H, W): uint8 (3, H, W)."""
    lookup = np.zeros((IGNORE_INDEX + 1, 3), dtype=np.uint8)
    lookup[: len(colors)] = colors
    lookup[IGNORE_INDEX] = VOID
    return torch.from_numpy(lookup[mask]).permute(2, 0, 1).contiguous()


def nearest_class(image: Tensor, colors: np.ndarray) -> Tensor:
    """Find the class with the nearest color at each pixel, except void: (3, H, W) in [0, 1] -> int64 (H, W)."""
    class_colors = torch.from_numpy(colors).float() / 255
    distances = torch.cdist(image.detach().float().cpu().flatten(1).T, class_colors)  # (H W, classes)
    return distances.argmin(1).view(image.shape[-2:])
