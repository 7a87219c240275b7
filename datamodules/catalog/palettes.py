"""Label maps as pictures: the colours that sets give their classes, and back again."""

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import UserError
from datamodules.transforms.downsample import IGNORE_INDEX

VOID = (0, 0, 0)  # what pixels that do not count are shown as
# In the order of the class ids. CamVid: SegNet's colours; Cityscapes: the set's own, of the 19 classes that count.
PALETTES = {
    "camvid": [(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
               (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)],
    "cityscapes": [(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
                   (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
                   (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)],
}  # fmt: skip


def palette(name: str) -> np.ndarray:
    """A set's colours, uint8 (classes, 3).

    Raises:
        Refused: none are known.
    """
    if name not in PALETTES:
        raise UserError(f"no colours are known for the classes of {name}; sets that have: {', '.join(PALETTES)}")
    return np.array(PALETTES[name], dtype=np.uint8)


def colorize(mask: np.ndarray, colours: np.ndarray) -> Tensor:
    """Class ids (H, W) as a picture: uint8 (3, H, W)."""
    every = np.zeros((IGNORE_INDEX + 1, 3), dtype=np.uint8)
    every[: len(colours)] = colours
    every[IGNORE_INDEX] = VOID
    return torch.from_numpy(every[mask]).permute(2, 0, 1).contiguous()


def nearest_class(picture: Tensor, colours: np.ndarray) -> Tensor:
    """The class whose colour is nearest to each pixel's: (3, H, W) in [0, 1] to int64 (H, W). Void is no class to choose."""
    of_class = torch.from_numpy(colours).float() / 255
    distances = torch.cdist(picture.detach().float().cpu().flatten(1).T, of_class)  # (H W, classes)
    return distances.argmin(1).view(picture.shape[-2:])
