"""Decode image files to 8-bit pixels, with a one-line error for every unusable file."""

import contextlib
import hashlib
import math
import os
import re
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from datamodules.errors import UserError

DESCRIPTION = 270  # TIFF tag
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange width and height
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # last bytes of a complete file
SUFFIXES_OF_16_BITS = (".png", ".tif", ".tiff", ".ppm", ".pnm")
# What PIL raises for a file that it cannot read.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, struct.error, Image.DecompressionBombError)
Image.init()
# Formats that are read, whatever the suffix of a file. Others could start programs: PIL reads EPS with Ghostscript.
FORMATS = tuple(
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN
)


def set_size_limit() -> None:
    """Set the largest image that is decoded to DARKROOM_MAX_MEGAPIXELS; the default is that of PIL, 89 megapixels.

    Raises:
        UserError: the environment variable is not a positive number.
    """
    if (text := os.environ.get("DARKROOM_MAX_MEGAPIXELS")) is None:
        return
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"DARKROOM_MAX_MEGAPIXELS: {text} is not a positive whole number. Use a number such as 200")
    Image.MAX_IMAGE_PIXELS = int(text) * 10**6


set_size_limit()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `open_image` raises InvalidImage instead


class InvalidImage(UserError):
    """A file cannot be used as an image; the message names the file and the reason."""


def open_image(path: str | Path, page: int | None = None) -> Image.Image:
    """Decode an image completely, in its PIL mode, with the EXIF orientation applied.

    Args:
        path: image file.
        page: index of a page of a stack; None for a file of one image.

    Raises:
        InvalidImage: the file is missing, empty, truncated, not an image, or unreadable, or it has several pages or frames
            although `page` is None.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise InvalidImage(f"{path}: empty file")
        with Image.open(path, formats=FORMATS) as image:
            if page is None and (pages := _pages(image)) > 1:
                raise InvalidImage(f"{path}: {pages} pages or frames. Only segmentation reads stacks; save each as an image")
            image.seek(page or 0)
            if page is not None and (channels := _channels(image)) > 1:
                raise InvalidImage(f"{path}: its pages are {channels} channels of each image. Save one channel")
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise InvalidImage(f"{path}: no such file") from None
    except PermissionError:
        raise InvalidImage(f"{path}: not readable (permissions)") from None
    except UnidentifiedImageError:
        raise InvalidImage(f"{path}: not an image in a known format") from None
    except Image.DecompressionBombError:
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise InvalidImage(
            f"{path}: more than {limit:.3g} megapixels, a possible decompression bomb. "
            "If you trust the file, set the environment variable DARKROOM_MAX_MEGAPIXELS to a larger number"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, OverflowError, struct.error) as error:
        raise InvalidImage(f"{path}: truncated or damaged ({error})") from None


def count_pages(path: str | Path) -> int:
    """Return the number of pages or frames of an image file; 1 if it cannot be read, see `open_image` for the error."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _pages(image)
    except UNREADABLE:
        return 1


def read_orientation(path: str | Path) -> int:
    """Return the EXIF orientation of an image file, 1 to 8, without decoding it; 1 if it has none."""
    with Image.open(path, formats=FORMATS) as image:
        return _orientation(image)


def note_on_losses(paths: Iterable[Path]) -> str:
    """Return a remark on the files of which Pillow drops information; empty if there are none.

    Pillow reads the upper 8 bits of color and of gray with transparency, and 16-bit gray without its transparency.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        if path.suffix.lower() in SUFFIXES_OF_16_BITS:
            with contextlib.suppress(*UNREADABLE), Image.open(path, formats=FORMATS) as image:
                if loss := _loss(image):
                    found.setdefault(loss, []).append(path)
    return "; ".join(f"{loss} (files: {len(files)}, such as {files[0]})" for loss, files in found.items())


def _loss(image: Image.Image) -> str:
    """Return what Pillow drops of an image whose pixels are not decoded yet; empty if it drops nothing."""
    if image.mode.startswith("I"):
        return "16-bit gray is read without its transparency" if "transparency" in image.info else ""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else ""
    storage = arguments[0] if isinstance(arguments, tuple) and arguments else arguments  # such as "RGB;16B"
    many = ";16" in str(storage) or (image.format == "PPM" and isinstance(arguments, tuple) and arguments[-1] > 255)
    if not many or len(image.getbands()) == 1:
        return ""
    return f"{'gray with transparency' if str(storage).startswith('LA') else 'color'} of 16 bits is read with 8 bits"


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:  # its getexif would decode the pixels to look for EXIF data
        return 1
    return image.getexif().get(ORIENTATION, 1)


def _channels(image: Image.Image) -> int:
    """Return the number of channels that are stored as pages, by the description of ImageJ or of OME."""
    if len(image.getbands()) > 1:
        return 1
    description = str(getattr(image, "tag_v2", {}).get(DESCRIPTION, ""))
    found = re.search(
        r"^channels=(\d+)$" if description.startswith("ImageJ=") else r'\bSizeC="(\d+)"', description, re.MULTILINE
    )
    return int(found[1]) if found else 1


def _pages(image: Image.Image) -> int:
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photograph with its previews


def read_image(path: str | Path) -> Tensor:
    """Read an image as uint8: (1, H, W) for grayscale files, else (3, H, W) RGB. Alpha is dropped.

    Raises:
        InvalidImage: see `open_image`; also for floating-point files, because their value range is unknown.
    """
    return to_pixels(open_image(path), path)


def to_pixels(image: Image.Image, path: str | Path) -> Tensor:
    """Convert a PIL image of any mode to uint8 (1 or 3, H, W); `path` is used in error messages.

    Raises:
        InvalidImage: pixels are floating-point, or integers outside 0..65535.
    """
    if image.mode == "F":
        raise InvalidImage(f"{path}: floating-point pixels of unknown range. Save the image with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grayscale: 65535 is white
        gray = np.asarray(image).astype(np.float64)
        if gray.min() < 0 or gray.max() > 65535:
            raise InvalidImage(f"{path}: integer pixels outside 0..65535")
        return torch.from_numpy(np.floor(gray / 257 + 0.5).astype(np.uint8))[None]
    if image.mode in ("1", "L", "LA"):
        return torch.from_numpy(np.array(image.convert("L")))[None]
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_channels(pixels: Tensor, channels: int) -> Tensor:
    """Convert uint8 or float32 (1 or 3, H, W) to 1 or 3 channels: repeat gray, or reduce RGB to full-range BT.601 luma."""
    if len(pixels) > channels:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        luma = (pixels.float() * weights).sum(0, keepdim=True)
        return luma.round().to(torch.uint8) if pixels.dtype == torch.uint8 else luma
    return pixels.expand(channels, -1, -1)


def pixel_hash(pixels: Tensor) -> str:
    """Return the sha256 of the shape and the decoded pixels; it is equal for all lossless copies of an image."""
    shape = "x".join(map(str, pixels.shape))
    return hashlib.sha256(f"{shape} ".encode() + pixels.numpy().tobytes()).hexdigest()


def probe_image(path: str | Path, min_size: int) -> str:
    """Check a file by its header and its last bytes, and a PNG by its checksums; decode it only if these are inconclusive.

    Returns:
        Size of the image and of the file: "500x375 10964".

    Raises:
        InvalidImage: see `open_image` and `check_size`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            if _pages(image) > 1:
                raise ValueError
            width, height = image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size
            if image.format == "PNG":
                image.verify()  # checksums of all chunks
            length = file.seek(0, 2)
            file.seek(max(0, length - 64))
            complete = image.format in END_MARKERS and END_MARKERS[image.format] in file.read()
    except UNREADABLE:
        complete = False  # `open_image` raises the exact error
    if not complete:
        width, height = open_image(path).size
    check_size(width, height, path, min_size)
    return f"{width}x{height} {path.stat().st_size}"


def check_size(width: int, height: int, path: str | Path, min_size: int) -> None:
    """Check that width and height are at least `min_size` pixels.

    Raises:
        InvalidImage: the image is too small.
    """
    if min(height, width) < min_size:
        raise InvalidImage(f"{path}: {width}x{height} pixels, too small: at least {min_size}x{min_size} are needed")
