"""Reading pictures: every file either gives clean 8-bit pixels or is named in one line that says what is wrong with it."""

import hashlib
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from datamodules.errors import UserError

ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what the last bytes of a whole file hold

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such a picture is refused here


class InvalidImage(UserError):
    """A file that cannot be used as a picture; the message names it and says why."""


def open_image(path: str | Path) -> Image.Image:
    """Decode a picture completely, upright (EXIF orientation applied), in PIL's own mode.

    Raises:
        BadImage: the file is missing, empty, cut short, not a picture, or unreadable.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise InvalidImage(f"{path}: empty file")
        with Image.open(path) as image:
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
        raise InvalidImage(f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels, refused as a decompression bomb") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InvalidImage(f"{path}: cut short or damaged ({error})") from None


def read_image(path: str | Path) -> Tensor:
    """A picture's 8-bit pixels: uint8, (1, H, W) if the file is grey, else (3, H, W) RGB. Alpha is dropped.

    Raises:
        BadImage: see `open_image`; also for floating-point files, whose value range is not known.
    """
    return to_pixels(open_image(path), path)


def to_pixels(image: Image.Image, path: str | Path) -> Tensor:
    """A decoded PIL image of any mode as uint8 (1 or 3, H, W); `path` is for the message of a refusal."""
    if image.mode == "F":
        raise InvalidImage(f"{path}: floating-point pixels of unknown range; save it as 8- or 16-bit")
    if image.mode.startswith("I"):  # 16-bit grey: 65535 is white
        grey = np.asarray(image).astype(np.float64)
        if grey.min() < 0 or grey.max() > 65535:
            raise InvalidImage(f"{path}: integer pixels outside 0..65535")
        return torch.from_numpy(np.floor(grey / 257 + 0.5).astype(np.uint8))[None]
    if image.mode in ("1", "L", "LA"):
        return torch.from_numpy(np.array(image.convert("L")))[None]
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_channels(pixels: Tensor, channels: int) -> Tensor:
    """uint8 pixels (1 or 3, H, W) with 1 or 3 channels: grey is repeated, of colours the luma is taken (BT.601, full range)."""
    if len(pixels) > channels:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        return (pixels.float() * weights).sum(0, keepdim=True).round().to(torch.uint8)
    return pixels.expand(channels, -1, -1)


def pixel_hash(pixels: Tensor) -> str:
    """sha256 over a picture's decoded pixels and their shape: the same for every lossless copy of it."""
    shape = "x".join(map(str, pixels.shape))
    return hashlib.sha256(f"{shape} ".encode() + pixels.numpy().tobytes()).hexdigest()


def probe_image(path: str | Path, minimum: int) -> str:
    """Look at a file's header and its last bytes; what cannot be judged from them is decoded.

    Returns:
        Size of the picture and of the file: "500x375 10964".

    Raises:
        BadImage: see `open_image` and `check_size`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, Image.open(file) as image:
            width, height = image.size
            length = file.seek(0, 2)
            file.seek(max(0, length - 64))
            whole = image.format in ENDS and ENDS[image.format] in file.read()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        whole = False  # `open_image` says what is wrong
    if not whole:
        width, height = open_image(path).size
    check_size(width, height, path, minimum)
    return f"{width}x{height} {path.stat().st_size}"


def check_size(width: int, height: int, path: str | Path, minimum: int) -> None:
    """Raise BadImage if a picture is narrower or lower than `minimum` pixels."""
    if min(height, width) < minimum:
        raise InvalidImage(f"{path}: {width}x{height} pixels, too small: at least {minimum}x{minimum} are needed")
