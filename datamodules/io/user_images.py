"""Inputs of `darkroom predict`: image files as network inputs, and outputs as PIL images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, TiffImagePlugin
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.io.folders import list_images, list_unreadable
from datamodules.io.image_io import (
    DESCRIPTION,
    FORMATS,
    ORIENTATION,
    InvalidImage,
    count_pages,
    open_image,
    to_channels,
    to_pixels,
)
from datamodules.io.value_range import ValueRange, read_levels
from datamodules.transforms import resize
from datamodules.transforms.color import is_gray, rgb_to_ycbcr, ycbcr_to_rgb
from datamodules.transforms.downsample import downsample_image
from datamodules.transforms.resize import imresize

TILE = 256  # pixels of the input at a side of a tile, when its chroma is enlarged
TILE_MARGIN = 4  # pixels around a tile; a value of a bicubic interpolation depends on two on each side


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
        pixels, alpha = read_pixels(image, self.files[index])
        pixels = pixels / 255
        chroma = torch.empty(0)
        if is_gray(pixels):
            pixels = pixels[:1]
        elif self.channels == 1:
            pixels, chroma = rgb_to_ycbcr(pixels).split([1, 2])
        return {
            "input": pixels[None],
            "chroma": chroma,
            "alpha": alpha,
            "path": str(self.files[index]),
            "size": f"{image.width}x{image.height}",
        }


class SegmentationInputs(Dataset[dict[str, Any]]):
    """Inputs of segmentation, from images of any size and mode.

    Args:
        files: readable image files.
        channels: 1 for luma or 3 for RGB.
        downscale: integer factor by which images are reduced after reading.
        value_range: rule for black and white, as in training.
    """

    def __init__(self, files: Sequence[Path], channels: int, downscale: int = 1, value_range: ValueRange = "dtype") -> None:
        self.files, self.channels, self.downscale, self.value_range = files, channels, downscale, value_range

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"image": float32 (P, channels, h, w) in [0, 1], "photo": uint8 (P, 1 or 3, H, W), "path": str}.

        P is the number of pages of a stack, 1 for a single image.

        Raises:
            InvalidImage: the image is smaller than `downscale` pixels, or the pages of a stack have different sizes.
        """
        path = self.files[index]
        count = count_pages(path)
        pages = [read_levels(path, self.value_range, page) for page in (range(count) if count > 1 else [None])]
        if any(page.shape != pages[0].shape for page in pages):
            raise InvalidImage(f"{path}: its pages have different sizes or modes. Save each page as an image")
        if min(pages[0].shape[-2:]) < self.downscale:
            raise InvalidImage(
                f"{path}: {pages[0].shape[-1]}x{pages[0].shape[-2]} pixels, "
                f"too small: at least {self.downscale}x{self.downscale} are needed"
            )
        images = [downsample_image(to_channels(page, self.channels), self.downscale).float() / 255 for page in pages]
        photo = torch.stack([page.round().to(torch.uint8) for page in pages])
        return {"image": torch.stack(images), "photo": photo, "path": str(path)}


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
        pixels, alpha = read_pixels(image, self.files[index])
        source_pixels = to_channels(pixels, 3)[None]
        if self.short_side is not None:
            sides = [max(1, round(side * self.short_side / min(source_pixels.shape[-2:]))) for side in source_pixels.shape[-2:]]
            source_pixels = F.interpolate(source_pixels, sides, mode="bicubic", antialias=True).round().clamp(0, 255)
        return {
            "image": source_pixels / 255,
            "direction": [self.direction],
            "chroma": torch.empty(0),
            "alpha": alpha,
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
            with Image.open(file, formats=FORMATS) as image:  # reads the header only
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
        pixels, alpha = read_pixels(image, self.files[index])
        return {
            "image": to_channels(pixels, 3)[None] / 255,
            "chroma": torch.empty(0),
            "alpha": alpha,
            "path": str(self.files[index]),
            "size": f"{image.width}x{image.height}",
        }


def read_pixels(image: Image.Image, path: Path) -> tuple[Tensor, Tensor]:
    """Return the pixels of an image, float32 (1 or 3, H, W) in [0, 255], and its alpha channel (1, H, W) in [0, 1], or empty.

    16-bit gray keeps its levels. The color of a fully transparent pixel is not seen, and is often black; it is replaced by that
    of the nearest other pixel, so that a network does not spread it over the edge.
    """
    if image.mode.startswith("I"):
        return read_levels(path), torch.empty(0)
    pixels = to_pixels(image, path).float()
    if not image.has_transparency_data:
        return pixels, torch.empty(0)
    alpha = np.array(image.convert("RGBA").getchannel("A"))
    if (alpha == 0).any() and alpha.any():
        rows, columns = distance_transform_edt(alpha == 0, return_distances=False, return_indices=True)
        pixels = pixels[:, torch.from_numpy(rows), torch.from_numpy(columns)]
    return pixels, torch.from_numpy(alpha)[None].float() / 255


def merge_channels(luma: Tensor, chroma: Tensor, alpha: Tensor, bits: int = 8) -> Image.Image:
    """Combine luma, chroma and alpha into an 8-bit image of mode L, LA, RGB or RGBA, or into 16-bit gray.

    If the luma is larger by a whole factor, the image is computed in tiles, which bounds the memory.

    Args:
        luma: (1, H, W) in [0, 1]; or RGB, (3, H, W), with empty chroma.
        chroma: Cb and Cr, (2, h, w), or empty; resized to (H, W) by bicubic interpolation.
        alpha: (1, h, w), or empty; resized in the same way.
        bits: 8, or 16 for luma alone.
    """
    height, width = luma.shape[-2:]
    if bits == 16:
        return Image.fromarray((luma[0].double() * 65535 + 0.5).floor().clamp(0, 65535).numpy().astype(np.uint16))
    sources = [source for source in (chroma, alpha) if source.numel()]
    levels = np.empty((height, width, (3 if chroma.numel() else len(luma)) + (1 if alpha.numel() else 0)), dtype=np.uint8)
    small_height, small_width = sources[0].shape[-2:] if sources else (height, width)
    factor = height // small_height
    tiled = (height, width) == (factor * small_height, factor * small_width)
    side = TILE if tiled else max(small_height, small_width)
    for top in range(0, small_height, side):
        for left in range(0, small_width, side):
            rows = slice(top, min(top + side, small_height))
            columns = slice(left, min(left + side, small_width))
            if tiled:
                place = (slice(factor * rows.start, factor * rows.stop), slice(factor * columns.start, factor * columns.stop))
                parts = [enlarge_tile(source, rows, columns, factor) for source in sources]
            else:
                place = (slice(0, height), slice(0, width))
                parts = [imresize(source, (height, width)) for source in sources]
            channels = luma[(..., *place)].float()
            if chroma.numel():
                channels = ycbcr_to_rgb(torch.cat([channels, parts.pop(0)]))
            channels = torch.cat([channels, *parts])
            levels[place] = (channels * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def enlarge_tile(image: Tensor, rows: slice, columns: slice, factor: int) -> Tensor:
    """Return the part of an enlarged image (C, H, W) that belongs to a tile of the small one, by bicubic interpolation.

    The tile is enlarged with the pixels around it on which its values depend.
    """
    top, left = max(0, rows.start - TILE_MARGIN), max(0, columns.start - TILE_MARGIN)
    part = image[..., top : rows.stop + TILE_MARGIN, left : columns.stop + TILE_MARGIN]
    enlarged = imresize(part, (factor * part.shape[-2], factor * part.shape[-1]))
    first_row, first_column = factor * (rows.start - top), factor * (columns.start - left)
    height, width = factor * (rows.stop - rows.start), factor * (columns.stop - columns.start)
    return enlarged[..., first_row : first_row + height, first_column : first_column + width]


class ImageFileInfo(NamedTuple):
    """What an image file contains besides its pixels, for the file that is made from it.

    Args:
        bits: bits per value of a gray image: 8 or 16; 8 for color.
        options: arguments of PIL's `Image.save`: the ICC profile, the EXIF data without orientation, and the resolution.
    """

    bits: int
    options: dict[str, Any]


def read_info(path: Path, mode: str) -> ImageFileInfo:
    """Read what the output of mode `mode` (L, LA, RGB or RGBA) keeps of an input file.

    A color profile is kept if it describes the mode: that of a CMYK file is not, because its pixels are converted.
    """
    with Image.open(path, formats=FORMATS) as image:
        options: dict[str, Any] = {}
        profile = image.info.get("icc_profile") or b""
        if profile[16:20] == (b"GRAY" if mode.startswith("L") else b"RGB "):
            options["icc_profile"] = profile
        exif = image.getexif()
        exif.pop(ORIENTATION, None)  # the pixels are turned
        if exif and image.format != "TIFF":  # the tags of a TIFF file describe its storage
            options["exif"] = exif.tobytes()
        if "dpi" in image.info:
            options["dpi"] = tuple(float(value) for value in image.info["dpi"])
        return ImageFileInfo(16 if image.mode.startswith("I") else 8, options)


# TIFF tags of the size of a pixel: XResolution, YResolution, ResolutionUnit; and lines of ImageJ's description for a stack.
RESOLUTION_TAGS = (282, 283, 296)
IMAGEJ_LINES = ("ImageJ", "images", "slices", "frames", "hyperstack", "unit", "spacing", "finterval")


def read_scale(path: Path, stack: bool) -> dict[str, Any]:
    """Return the arguments of PIL's `Image.save` with which a PNG file, or a stack as a TIFF file, keeps the size of a pixel.

    ImageJ stores its unit, and the distance between the pages, in the description. The range of the display is left out.
    """
    with Image.open(path, formats=FORMATS) as image:
        if not stack:
            return {"dpi": tuple(float(value) for value in image.info["dpi"])} if "dpi" in image.info else {}
        tags = getattr(image, "tag_v2", {})
        kept = TiffImagePlugin.ImageFileDirectory_v2()
        for tag in RESOLUTION_TAGS:
            if tag in tags:
                kept[tag] = tags[tag]
        if (description := str(tags.get(DESCRIPTION, ""))).startswith("ImageJ="):
            lines = [line for line in description.splitlines() if line.partition("=")[0] in IMAGEJ_LINES]
            kept[DESCRIPTION] = "\n".join([*lines, ""])
        return {"tiffinfo": kept}


def list_user_images(
    path: Path, exclude: Path, stacks: bool, value_range: ValueRange = "dtype"
) -> tuple[list[Path], list[str]]:
    """List the images of a file or a folder, and check that each can be decoded.

    Args:
        path: a file or a folder.
        exclude: folder below `path` to skip, such as the output folder.
        stacks: accept files of several pages.
        value_range: rule for black and white.

    Returns:
        The images, and the reasons why other images cannot be used.

    Raises:
        InvalidImage: the folder has no images.
    """
    excluded = exclude.resolve()

    def is_used(file: Path) -> bool:
        return not path.is_dir() or excluded == path.resolve() or excluded not in file.resolve().parents

    candidates = [file for file in (list_images(path, broken_links=True) if path.is_dir() else [path]) if is_used(file)]
    files, reasons = [], []
    for file in candidates:
        try:
            page = 0 if stacks and count_pages(file) > 1 else None
            read_levels(file, value_range, page)
            files.append(file)
        except InvalidImage as error:
            reasons.append(str(error))
    if path.is_dir():
        reasons += [
            f"{file}: {file.suffix} files cannot be read. Convert it" for file in list_unreadable(path) if is_used(file)
        ]
    if not files and not reasons:
        raise InvalidImage(f"{path}: no images in this folder. Give a folder with image files, or an image")
    return files, reasons
