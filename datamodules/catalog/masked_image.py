"""An image with a segmentation mask: read both files, and map mask values to classes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import label
from torch import Tensor

from datamodules.io.image_io import FORMATS, InvalidImage, open_image, read_orientation, to_channels
from datamodules.io.image_refs import ImageRef
from datamodules.io.value_range import ValueRange, read_levels
from datamodules.transforms.downsample import downsample_image, downsample_mask


@dataclass(frozen=True)
class MaskSpec:
    """Meaning of the values of a dataset's masks.

    Args:
        classes: class names in the order of their ids; empty if unknown.
        value_map: mask value -> class id; empty if the values are class ids.
        default_class: class id of all other values; None to raise an error for them.
        instances: whether the values are instance ids, 0 for the background; the classes are background and object.
        mask_format: "ids" for class ids or instance ids; "binary" for 0 and any other value, such as 255, where the connected
            parts are the instances; "colors" for the `colors` of the classes; "rle" for the run lengths of a CSV file.
        colors: RGB color of each class, for the format "colors".
    """

    classes: tuple[str, ...] = ()
    value_map: dict[int, int] = field(default_factory=dict)
    default_class: int | None = None
    instances: bool = False
    mask_format: Literal["ids", "binary", "colors", "rle"] = "ids"
    colors: tuple[tuple[int, int, int], ...] = ()


class MaskedSample(NamedTuple):
    """A decoded image and its mask."""

    pixels: Tensor  # uint8 (C, H, W), or float32 in [0, 255]
    mask: np.ndarray  # uint8 (H, W): class ids; 1 for every object of an instance mask
    instance_ids: np.ndarray  # int32 (H, W): 0 for the background; without instance masks, connected components of class 1
    instances: bool


@dataclass(frozen=True)
class MaskedImage:
    """An image file, its mask file, and the meaning of the mask values.

    Args:
        image, mask, mask_spec: see above.
        page: index of the page, if both files are stacks; else None.
        value_range: rule for black and white of the image.
    """

    image: ImageRef
    mask: Path
    mask_spec: MaskSpec
    page: int | None = None
    value_range: ValueRange = "dtype"

    def in_dataset(self, name: str) -> "MaskedImage":
        """Return the image as one of another dataset in logs and records."""
        return replace(self, image=self.image._replace(dataset=name))

    def read(self, channels: int, downscale: int = 1) -> tuple[Tensor, np.ndarray]:
        """Read the image (channels, H, W), see `read_levels`, and the mask (H, W) of `read_mask`, both reduced by `downscale`.

        Raises:
            InvalidImage: one of them is unusable, their sizes differ, or only one is turned by an EXIF orientation.
        """
        pixels, values = read_levels(self.image.path, self.value_range, self.page), self.read_mask()
        if pixels.shape[-2:] != values.shape:
            mask_size, image_size = (f"{shape[1]}x{shape[0]}" for shape in (values.shape, pixels.shape[-2:]))
            raise InvalidImage(f"{self.mask}: {mask_size} pixels, but its image has {image_size}. Save both at the same size")
        check_orientation(self.image.path, self.mask, values.shape)
        return downsample_image(to_channels(pixels, channels), downscale), downsample_mask(values, downscale)

    def load(self, channels: int, downscale: int = 1) -> MaskedSample:
        """Read image, class ids and instance ids.

        Raises:
            InvalidImage: see `read`.
        """
        pixels, values = self.read(channels, downscale)
        if self.mask_spec.instances:
            ids = np.unique(np.append(values, 0), return_inverse=True)[1][:-1]  # consecutive, 0 for the background
            return MaskedSample(pixels, (values > 0).astype(np.uint8), ids.reshape(values.shape).astype(np.int32), True)
        return MaskedSample(pixels, values.astype(np.uint8), label(values == 1)[0].astype(np.int32), False)

    def read_mask(self) -> np.ndarray:
        """Read class ids or instance ids: int32 (H, W).

        Raises:
            InvalidImage: the file is not a mask, or a value has no class.
        """
        if self.mask.suffix.lower() in (".jpg", ".jpeg", ".jfif"):
            raise InvalidImage(f"{self.mask}: JPEG changes the values of a mask. Save it as PNG from the original")
        mask = open_image(self.mask, self.page)
        if mask.mode == "LA":
            mask = mask.getchannel("L")
        if self.mask_spec.mask_format == "colors":
            return class_ids_of_colors(np.asarray(mask.convert("RGB")), self.mask_spec.colors, self.mask)
        values = np.asarray(mask)
        if values.ndim != 2:
            advice = "Save one integer per pixel, and a stack as pages of one channel; or set data.mask_format colors"
            raise InvalidImage(f"{self.mask}: a color image, not class ids. {advice}")
        if values.dtype.kind == "f" or values.min() < 0:
            raise InvalidImage(f"{self.mask}: fractions or negative numbers, not ids. Save integers from 0")
        values = values.astype(np.int32) // gray_step(self.mask)
        if self.mask_spec.mask_format == "binary":
            return label(values > 0)[0].astype(np.int32) if self.mask_spec.instances else (values > 0).astype(np.int32)
        if not self.mask_spec.value_map:
            return values
        present = np.unique(values)
        unknown = np.setdiff1d(present, list(self.mask_spec.value_map))
        if len(unknown) and self.mask_spec.default_class is None:
            raise InvalidImage(
                f"{self.mask}: the value {unknown[0]} is not one of {', '.join(map(str, self.mask_spec.value_map))}"
            )
        class_ids = np.array(
            [self.mask_spec.value_map.get(int(value), self.mask_spec.default_class) for value in present], dtype=np.int32
        )
        return class_ids[np.searchsorted(present, values)]


def gray_step(path: Path) -> int:
    """Return the factor by which PIL multiplies the values of a gray PNG of 2 or 4 bits, 85 or 17; 1 for all other files."""
    with path.open("rb") as file:
        header = file.read(26)
    is_gray_png = header[:8] == b"\x89PNG\r\n\x1a\n" and header[25] == 0
    return {2: 85, 4: 17}.get(header[24], 1) if is_gray_png else 1


def class_ids_of_colors(pixels: np.ndarray, colors: Sequence[Sequence[int]], path: Path) -> np.ndarray:
    """Return the class ids (H, W), int32, of the colors of a mask (H, W, 3).

    Raises:
        InvalidImage: a color belongs to no class.
    """
    codes = pixels.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    ids = np.full(codes.shape, -1, dtype=np.int32)
    for i, (red, green, blue) in enumerate(colors):
        ids[codes == 65536 * red + 256 * green + blue] = i
    if (ids < 0).any():
        row, column = np.argwhere(ids < 0)[0]
        color = tuple(int(value) for value in pixels[row, column])
        raise InvalidImage(f"{path}: the color {color} of pixel ({column}, {row}) belongs to no class. See data.class_colors")
    return ids


def check_orientation(image: Path, mask: Path, shape: tuple[int, ...]) -> None:
    """Check that the orientation in the EXIF data of an image does not turn it against a mask of the same size.

    Raises:
        InvalidImage: the image is turned, its mask is not, and the mask fits both the turned and the stored image.
    """
    turned, other = (read_orientation(path) if path.suffix != ".csv" else 1 for path in (image, mask))
    if turned != other and (shape[0] == shape[1] or max(turned, other) < 5):
        raise InvalidImage(f"{image}: an EXIF orientation turns it, but not its mask {mask}. Save the image without it")


@dataclass(frozen=True)
class RleImage(MaskedImage):
    """An image whose mask is a list of run lengths, one for each object."""

    runs: tuple[str, ...] = ()

    def read_mask(self) -> np.ndarray:
        """See `MaskedImage`.

        Raises:
            InvalidImage: the runs are not pairs of numbers, or leave the image.
        """
        with Image.open(self.image.path, formats=FORMATS) as image:
            width, height = image.size
        values = np.zeros(width * height, dtype=np.int32)
        for number, text in enumerate(self.runs, 1):
            words = text.split()
            if len(words) % 2 or not all(word.isdecimal() for word in words):
                raise InvalidImage(f"{self.mask}: {self.image.name}: '{text[:40]}' is not pairs of START and LENGTH")
            for start, length in zip(map(int, words[::2]), map(int, words[1::2]), strict=True):
                if not 1 <= start <= start + length - 1 <= len(values):
                    raise InvalidImage(
                        f"{self.mask}: {self.image.name}: the run {start} {length} leaves {width}x{height} pixels"
                    )
                values[start - 1 : start - 1 + length] = number if self.mask_spec.instances else 1
        return values.reshape(width, height).T.copy()
