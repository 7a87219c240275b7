"""Inputs of `darkroom predict`: image files as network inputs, and outputs as PIL images."""

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
from datamodules.transforms.color import is_gray, rgb_to_ycbcr, ycbcr_to_rgb
from datamodules.transforms.downsample import downsample_image
from datamodules.transforms.resize import imresize


class SuperResolutionInputs(Dataset[dict[str, Any]]):
    """Inputs of super-resolution, from images of any size and mode (gray, RGB, palette, alpha, CMYK, 16-bit).

    Args:
        files: readable image files.
        channels: 1 for luma or 3 for RGB.
    """

    def __init__(self, files: Sequence[Path], channels: int) -> None:
        self.files, self.channels = files, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the luma as "input" (1, 1, h, w), "chroma" (2, h, w), "alpha" (1, h, w), "path" and "size" ("WxH").

        "chroma" and "alpha" are empty if absent. Pixels are float32 in [0, 1]. With three channels, the "input" of color images
        is RGB (1, 3, h, w), and "chroma" is empty.
        """
        resize._placed_matrix.cache_clear()  # matrices of the last image's size: 25 MiB for 1500 pixels at scale 3
        image = open_image(self.files[index])
        pixels = to_pixels(image, self.files[index]).float() / 255
        chroma = torch.empty(0)
        if is_gray(pixels):
            pixels = pixels[:1]
        elif self.channels == 1:
            pixels, chroma = rgb_to_ycbcr(pixels).split([1, 2])
        return {
            "input": pixels[None],
            "chroma": chroma,
            "alpha": read_alpha(image),
            "path": str(self.files[index]),
            "size": f"{image.width}x{image.height}",
        }


class SegmentationInputs(Dataset[dict[str, Any]]):
    """Inputs of segmentation, from images of any size and mode.

    Args:
        files: readable image files.
        channels: 1 for luma or 3 for RGB.
        downscale: integer factor by which images are reduced after reading.
    """

    def __init__(self, files: Sequence[Path], channels: int, downscale: int = 1) -> None:
        self.files, self.channels, self.downscale = files, channels, downscale

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"image": float32 (1, channels, h, w) in [0, 1], "photo": uint8 (1 or 3, H, W), "path": str}.

        Raises:
            InvalidImage: the image is smaller than `downscale` pixels.
        """
        source_pixels = to_pixels(open_image(self.files[index]), self.files[index])
        if min(source_pixels.shape[-2:]) < self.downscale:
            raise InvalidImage(
                f"{self.files[index]}: {source_pixels.shape[-1]}x{source_pixels.shape[-2]} pixels, "
                f"too small: at least {self.downscale}x{self.downscale} are needed"
            )
        image = downsample_image(to_channels(source_pixels, self.channels), self.downscale)[None].float() / 255
        return {"image": image, "photo": source_pixels, "path": str(self.files[index])}


class TranslationInputs(Dataset[dict[str, Any]]):
    """RGB inputs of image translation, from images of any size and mode.

    Args:
        files: readable image files.
        short_side: length in pixels to which the shorter side is resized; None to keep the size.
        direction: "AtoB" or "BtoA".
    """

    def __init__(self, files: Sequence[Path], short_side: int | None, direction: str) -> None:
        self.files, self.short_side, self.direction = files, short_side, direction

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"image": float32 (1, 3, h, w) in [0, 1], "direction": [str]}, and the entries of `SuperResolutionInputs`.

        "input" is absent and "chroma" is empty.
        """
        image = open_image(self.files[index])
        source_pixels = to_channels(to_pixels(image, self.files[index]), 3)[None].float()
        if self.short_side is not None:
            sides = [max(1, round(side * self.short_side / min(source_pixels.shape[-2:]))) for side in source_pixels.shape[-2:]]
            source_pixels = F.interpolate(source_pixels, sides, mode="bicubic", antialias=True).round().clamp(0, 255)
        return {
            "image": source_pixels / 255,
            "direction": [self.direction],
            "chroma": torch.empty(0),
            "alpha": read_alpha(image),
            "path": str(self.files[index]),
            "size": f"{image.width}x{image.height}",
        }


class PhotographInputs(Dataset[dict[str, Any]]):
    """RGB inputs of style transfer and colorization, from images of any size and mode.

    Args:
        files: readable image files.
        min_side: smallest side in pixels.

    Raises:
        InvalidImage: images are smaller than `min_side` pixels; the message names them.
    """

    def __init__(self, files: Sequence[Path], min_side: int) -> None:
        sizes = {}
        for file in files:
            with Image.open(file) as image:  # reads the header only
                sizes[file] = image.size
        if small := [f"{file}: {w}x{h} pixels" for file, (w, h) in sizes.items() if min(w, h) < min_side]:
            raise InvalidImage(f"{'; '.join(small)}, too small: at least {min_side}x{min_side} are needed")
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"image": float32 (1, 3, h, w) in [0, 1]}, and the entries of `SuperResolutionInputs`.

        "input" is absent and "chroma" is empty.
        """
        image = open_image(self.files[index])
        return {
            "image": to_channels(to_pixels(image, self.files[index]), 3)[None].float() / 255,
            "chroma": torch.empty(0),
            "alpha": read_alpha(image),
            "path": str(self.files[index]),
            "size": f"{image.width}x{image.height}",
        }


def read_alpha(image: Image.Image) -> Tensor:
    """Return the alpha channel of an image, float32 (1, H, W) in [0, 1]; empty if absent."""
    if not image.has_transparency_data:
        return torch.empty(0)
    return torch.from_numpy(np.array(image.convert("RGBA").getchannel("A")))[None].float() / 255


def merge_channels(luma: Tensor, chroma: Tensor, alpha: Tensor) -> Image.Image:
    """Combine luma, chroma and alpha into an 8-bit image of mode L, LA, RGB or RGBA.

    Args:
        luma: (1, H, W) in [0, 1]; or RGB, (3, H, W), with empty chroma.
        chroma: Cb and Cr, (2, h, w), or empty; resized to (H, W) by bicubic interpolation.
        alpha: (1, h, w), or empty; resized in the same way.
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
    """List the images of a file or a folder, and check that each can be decoded.

    Args:
        source: path of the file or folder.
        exclude: folder below `source` to skip, such as the output folder.

    Raises:
        InvalidImage: there are no images, or some are unreadable; the message names them.
    """
    path = Path(source)
    excluded = exclude.resolve()
    paths = list_images(path) if path.is_dir() else [path]
    files = [
        file for file in paths if not path.is_dir() or excluded == path.resolve() or excluded not in file.resolve().parents
    ]
    if not files:
        raise InvalidImage(f"{path}: no images in this folder. Give a folder with image files, or an image")
    errors = []
    for file in files:
        try:
            to_pixels(open_image(file), file)
        except InvalidImage as error:
            errors.append(str(error))
    if errors:
        raise InvalidImage("; ".join(errors))
    return files
