"""A user's own pictures: taken apart for a network that enlarges luma, and put together again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.io.folders import list_images
from datamodules.io.image_io import InvalidImage, open_image, to_channels, to_pixels
from datamodules.transforms import resize
from datamodules.transforms.color import is_grey, rgb_to_ycbcr, ycbcr_to_rgb
from datamodules.transforms.downsample import downsample_image
from datamodules.transforms.resize import imresize


class LumaInputs(Dataset[dict[str, Any]]):
    """Pictures of any size and mode: grey, RGB, palette, with alpha, CMYK, 16-bit.

    Args:
        files: the pictures; each must be readable.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The luma as "input" (1, 1, h, w), what is not luma as "chroma" (2, h, w) and "alpha" (1, h, w), empty if none."""
        resize._placed_matrix.cache_clear()  # of the last picture's size: 25 MiB for 1500 pixels enlarged by 3
        image = open_image(self.files[index])
        pixels = to_pixels(image, self.files[index]).float() / 255
        chroma = torch.empty(0)
        if is_grey(pixels):
            luma = pixels[:1]
        else:
            luma, chroma = rgb_to_ycbcr(pixels).split([1, 2])
        return {
            "input": luma[None],
            "chroma": chroma,
            "alpha": read_alpha(image),
            "path": str(self.files[index]),
            "size": f"{image.width}x{image.height}",
        }


class SegmentationInputs(Dataset[dict[str, Any]]):
    """Pictures of any size and mode, with all their colours, or made grey for a network that sees only that.

    Args:
        files: the pictures; each must be readable.
        channels: 1 or 3.
        downscale: how many times smaller the network wants them.
    """

    def __init__(self, files: Sequence[Path], channels: int, downscale: int = 1) -> None:
        self.files, self.channels, self.downscale = files, channels, downscale

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": (1, channels, h, w) in [0, 1], "photo": uint8 (1 or 3, H, W), "path": str}."""
        photo = to_pixels(open_image(self.files[index]), self.files[index])
        if min(photo.shape[-2:]) < self.downscale:
            raise InvalidImage(
                f"{self.files[index]}: {photo.shape[-1]}x{photo.shape[-2]} pixels, too small to be shrunk by {self.downscale}"
            )
        image = downsample_image(to_channels(photo, self.channels), self.downscale)[None].float() / 255
        return {"image": image, "photo": photo, "path": str(self.files[index])}


class TranslationInputs(Dataset[dict[str, Any]]):
    """Pictures of any size and mode, in colour.

    Args:
        files: the pictures; each must be readable.
        short_side: what their shorter side is made, for a network that knows its domains at that size; None to leave it.
        direction: "AtoB" or "BtoA".
    """

    def __init__(self, files: Sequence[Path], short_side: int | None, direction: str) -> None:
        self.files, self.short_side, self.direction = files, short_side, direction

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": (1, 3, h, w) in [0, 1], "direction": [str], "path", "size", "chroma": empty, "alpha"}, see `LumaInputs`."""
        image = open_image(self.files[index])
        photo = to_channels(to_pixels(image, self.files[index]), 3)[None].float()
        if self.short_side is not None:
            sides = [max(1, round(side * self.short_side / min(photo.shape[-2:]))) for side in photo.shape[-2:]]
            photo = F.interpolate(photo, sides, mode="bicubic", antialias=True).round().clamp(0, 255)
        return {
            "image": photo / 255,
            "direction": [self.direction],
            "chroma": torch.empty(0),
            "alpha": read_alpha(image),
            "path": str(self.files[index]),
            "size": f"{image.width}x{image.height}",
        }


def read_alpha(image: Image.Image) -> Tensor:
    """A picture's opacity, (1, H, W) in [0, 1]; empty if it has none."""
    if not image.has_transparency_data:
        return torch.empty(0)
    return torch.from_numpy(np.array(image.convert("RGBA").getchannel("A")))[None].float() / 255


def merge_channels(luma: Tensor, chroma: Tensor, alpha: Tensor) -> Image.Image:
    """A picture as it came from a network, 8 bits a channel: L, LA, RGB or RGBA.

    Args:
        luma: (1, H, W); or all colours, (3, H, W), and no chroma.
        chroma: (2, h, w) Cb and Cr, or empty; enlarged here, bicubically.
        alpha: (1, h, w), or empty; likewise.
    """
    size = (luma.shape[-2], luma.shape[-1])
    channels = luma.float()
    if chroma.numel():
        channels = ycbcr_to_rgb(torch.cat([channels, imresize(chroma, size)]))
    if alpha.numel():
        channels = torch.cat([channels, imresize(alpha, size)])
    levels = (channels * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def list_user_images(source: str, exclude: Path) -> list[Path]:
    """The pictures that `source`, a file or a folder, names; each has been decoded once and can be read.

    Args:
        source: what a user names.
        exclude: a folder below it that is not meant, such as that of earlier results.

    Raises:
        BadImage: there are none, or some cannot be read; the message names them.
    """
    path = Path(source)
    inside = exclude.resolve()
    found = list_images(path) if path.is_dir() else [path]
    files = [file for file in found if not path.is_dir() or inside == path.resolve() or inside not in file.resolve().parents]
    if not files:
        raise InvalidImage(f"{path}: no pictures in this folder")
    bad = []
    for file in files:
        try:
            to_pixels(open_image(file), file)
        except InvalidImage as error:
            bad.append(str(error))
    if bad:
        raise InvalidImage("; ".join(bad))
    return files
