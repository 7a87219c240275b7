"""The range of the values of an image: which value is black, and which is white."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.io.image_io import FORMATS, InvalidImage, open_image, to_pixels

# dtype: 0 is black, and 255 or 65535 is white, by the number of bits. percentile: black and white are the percentiles 0.1 and
# 99.9 of the values of the image. metadata: the TIFF tags MinSampleValue and MaxSampleValue. Two numbers: black and white.
ValueRange = Literal["dtype", "percentile", "metadata"] | tuple[float, float]
PERCENTILES = (0.1, 99.9)
MIN_TAGS, MAX_TAGS = (280, 340), (281, 341)  # MinSampleValue or SMinSampleValue, and the same for the maximum


def read_levels(path: str | Path, value_range: ValueRange = "dtype", page: int | None = None) -> Tensor:
    """Read an image whose values are scaled so that black is 0 and white is 255.

    Args:
        path: image file.
        value_range: rule that determines black and white.
        page: index of a page of a stack; None for a file of one image.

    Returns:
        (1, H, W) for gray or (3, H, W) for RGB. It is uint8 for 8-bit images with the rule "dtype", and otherwise float32,
        which keeps 16 bits.

    Raises:
        InvalidImage: see `open_image`; or the rule cannot be applied to the image.
    """
    image = open_image(path, page)
    if value_range == "dtype" and not image.mode.startswith("I"):
        return to_pixels(image, path)
    values = _values(image)
    low, high = _black_and_white(values, value_range, path, page)
    return torch.from_numpy(((values - low) * (255 / (high - low))).clip(0, 255).astype(np.float32))


def _values(image: Image.Image) -> np.ndarray:
    """Return the stored values, float64 (1 or 3, H, W)."""
    if image.mode in ("F", "L") or image.mode.startswith("I"):
        return np.asarray(image).astype(np.float64)[None]
    gray = image.mode in ("1", "LA")
    pixels = np.asarray(image.convert("L" if gray else "RGB")).astype(np.float64)
    return pixels[None] if gray else pixels.transpose(2, 0, 1)


def _black_and_white(values: np.ndarray, rule: ValueRange, path: str | Path, page: int | None) -> tuple[float, float]:
    if rule == "dtype":
        low, high = 0.0, 65535.0
        if values.min() < low or values.max() > high:
            raise InvalidImage(f"{path}: integer pixels outside 0..65535. Set data.value_range to [BLACK, WHITE]")
    elif rule == "percentile":
        if not np.isfinite(values).all():
            raise InvalidImage(f"{path}: some pixels are not finite numbers. Replace them")
        low, high = (float(value) for value in np.percentile(values, PERCENTILES))
        high = high if high > low else low + 1  # an image of one value is black
    elif rule == "metadata":
        with Image.open(path, formats=FORMATS) as image:
            image.seek(page or 0)
            low, high = _tag(image, MIN_TAGS), _tag(image, MAX_TAGS)
        if not high > low:
            raise InvalidImage(f"{path}: no TIFF tag MaxSampleValue. Set data.value_range to percentile or [BLACK, WHITE]")
    else:
        low, high = rule
    return low, high


def _tag(image: Image.Image, tags: Sequence[int]) -> float:
    """Return the value of the first of the TIFF tags that the image has; 0 if there is none."""
    values = [value for tag in tags if (value := getattr(image, "tag_v2", {}).get(tag)) is not None]
    return float(values[0][0] if isinstance(values[0], tuple) else values[0]) if values else 0.0
