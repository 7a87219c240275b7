"""Reading pictures: every file either gives clean 8-bit pixels or is named in one line that says what is wrong with it."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class BadImage(ValueError):
    """A file that cannot be used as a picture; the message names it and says why."""


def open_image(path: str | Path) -> Image.Image:
    """Decode a picture completely, upright (EXIF orientation applied), in PIL's own mode.

    Raises:
        BadImage: the file is missing, empty, cut short, not a picture, or unreadable.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise BadImage(f"{path}: empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise BadImage(f"{path}: no such file") from None
    except PermissionError:
        raise BadImage(f"{path}: not readable (permissions)") from None
    except UnidentifiedImageError:
        raise BadImage(f"{path}: not an image in a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels, refused as a decompression bomb") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"{path}: cut short or damaged ({error})") from None


def read_image(path: str | Path) -> Tensor:
    """A picture's 8-bit pixels: uint8, (1, H, W) if the file is grey, else (3, H, W) RGB. Alpha is dropped.

    Raises:
        BadImage: see `open_image`; also for floating-point files, whose value range is not known.
    """
    return to_pixels(open_image(path), path)


def to_pixels(image: Image.Image, path: str | Path) -> Tensor:
    """A decoded PIL image of any mode as uint8 (1 or 3, H, W); `path` is for the message of a refusal."""
    if image.mode == "F":
        raise BadImage(f"{path}: floating-point pixels of unknown range; save it as 8- or 16-bit")
    if image.mode.startswith("I"):  # 16-bit grey: 65535 is white
        grey = np.asarray(image).astype(np.float64)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadImage(f"{path}: integer pixels outside 0..65535")
        return torch.from_numpy(np.floor(grey / 257 + 0.5).astype(np.uint8))[None]
    if image.mode in ("1", "L", "LA"):
        return torch.from_numpy(np.array(image.convert("L")))[None]
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def list_images(folder: str | Path) -> list[Path]:
    """The picture files in a folder and its sub-folders, sorted by path; hidden files are passed over."""
    folder = Path(folder)
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def check_size(image: Tensor, path: str | Path, minimum: int) -> None:
    """Raise BadImage if a (C, H, W) picture is narrower or lower than `minimum` pixels."""
    height, width = image.shape[-2:]
    if min(height, width) < minimum:
        raise BadImage(f"{path}: {width}x{height} pixels, too small: at least {minimum}x{minimum} are needed")
