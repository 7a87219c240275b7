"""Pictures with a mask each: where both are, and what the mask's values mean."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import binary_fill_holes, label
from torch import Tensor

from datamodules.catalog.catalog import DatasetNotFound, catalog, get_dataset, is_folder
from datamodules.errors import UserError
from datamodules.io.folders import list_images
from datamodules.io.image_io import InvalidImage, open_image, read_image, to_channels
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs
from datamodules.transforms.downsample import downsample_image, downsample_mask

COINS = {"train": (0, 256), "val": (256, 384)}  # columns of the one picture


@dataclass(frozen=True)
class MaskSpec:
    """What the values of a set's masks mean.

    Args:
        classes: names of the classes, in the order of their ids; empty where they are not known.
        values: the class of each value of the files, where those are not the ids; all others are refused, or ignored.
        default_class: what values that are not in `values` become; None to refuse them.
        instances: the values are numbers of objects, 0 for the ground; the classes are ground and object.
    """

    classes: tuple[str, ...] = ()
    values: dict[int, int] = field(default_factory=dict)
    default_class: int | None = None
    instances: bool = False


class Sample(NamedTuple):
    """A picture as it is trained or measured on."""

    pixels: Tensor  # uint8 (C, H, W)
    mask: np.ndarray  # uint8 (H, W): class ids; 1 for all objects
    instance_ids: np.ndarray  # int32 (H, W): numbers of the objects, 0 for the ground; else the connected parts of class 1
    instances: bool


@dataclass(frozen=True)
class MaskedImage:
    """A picture, its mask, and how that is read."""

    picture: ImageRef
    mask: Path
    meaning: MaskSpec

    def read(self, channels: int, downscale: int = 1) -> tuple[Tensor, np.ndarray]:
        """The picture, uint8 (channels, H, W), and its mask, see `read_mask`; both may be smaller by a whole number.

        Raises:
            BadImage: they cannot be used.
        """
        pixels, values = read_image(self.picture.path), self.read_mask()
        if pixels.shape[-2:] != values.shape:
            sizes = " but ".join(f"{shape[1]}x{shape[0]}" for shape in (values.shape, pixels.shape[-2:]))
            raise InvalidImage(f"{self.mask}: {sizes} is its picture's size")
        return downsample_image(to_channels(pixels, channels), downscale), downsample_mask(values, downscale)

    def load(self, channels: int, downscale: int = 1) -> Sample:
        """The same with what follows from it."""
        pixels, values = self.read(channels, downscale)
        if self.meaning.instances:
            numbers = np.unique(np.append(values, 0), return_inverse=True)[1][:-1]  # without gaps, 0 for the ground
            return Sample(pixels, (values > 0).astype(np.uint8), numbers.reshape(values.shape).astype(np.int32), True)
        return Sample(pixels, values.astype(np.uint8), label(values == 1)[0].astype(np.int32), False)

    def read_mask(self) -> np.ndarray:
        """Class ids, or numbers of objects, int32 (H, W).

        Raises:
            BadImage: the file is no mask, or a value has no meaning.
        """
        values = np.asarray(open_image(self.mask))
        if values.ndim != 2:
            raise InvalidImage(f"{self.mask}: colours instead of class ids; save one number a pixel")
        if values.dtype.kind == "f" or values.min() < 0:
            raise InvalidImage(f"{self.mask}: fractions or negative numbers instead of ids; save whole ones from 0 on")
        values = values.astype(np.int32)
        if not self.meaning.values:
            return values
        present = np.unique(values)
        strange = np.setdiff1d(present, list(self.meaning.values))
        if len(strange) and self.meaning.default_class is None:
            raise InvalidImage(f"{self.mask}: the value {strange[0]} is none of {', '.join(map(str, self.meaning.values))}")
        kinds = np.array([self.meaning.values.get(int(value), self.meaning.default_class) for value in present], dtype=np.int32)
        return kinds[np.searchsorted(present, values)]


@dataclass(frozen=True)
class CoinsImage(MaskedImage):
    """Part of scikit-image's picture of coins, whose mask is derived from it, as in that library's own example."""

    columns: tuple[int, int] = (0, 384)

    def read(self, channels: int, downscale: int = 1) -> tuple[Tensor, np.ndarray]:
        """See `MaskedImage`."""
        pixels = read_image(self.picture.path)
        part = slice(*self.columns)
        values = label(coins_mask(self.picture.path)[:, part])[0].astype(np.int32)
        return downsample_image(to_channels(pixels[..., part], channels), downscale), downsample_mask(values, downscale)

    def read_mask(self) -> np.ndarray:
        """See `MaskedImage`."""
        return self.read(1)[1]


@cache
def coins_mask(path: Path) -> np.ndarray:
    """Coins, found by flooding the edges from what is surely dark and surely bright: bool (H, W)."""
    from skimage.filters import sobel
    from skimage.morphology import remove_small_objects
    from skimage.segmentation import watershed

    grey = read_image(path)[0].numpy()
    markers = np.select([grey < 30, grey > 150], [1, 2], 0)
    coins = binary_fill_holes(watershed(sobel(grey), markers) == 2)
    return remove_small_objects(coins, max_size=500)


def list_masked_images(spec: str, instances: bool = False) -> list[MaskedImage]:
    """The pictures and masks that a recipe's data key names.

    Args:
        spec: a set of the catalogue, a split of one ("camvid/train"), or a folder of one's own with `images` and `masks`,
            in which a picture and its mask have the same name.
        instances: whether the masks of such a folder are numbers of objects.

    Raises:
        MissingData: something is not here.
        Refused: the set has no masks.
    """
    if is_folder(spec):
        return _of_folder(Path(spec), MaskSpec(instances=instances))
    name, _, split = spec.partition("/")
    entry = get_dataset(name) if name in catalog() else None
    if entry is None:
        return [
            MaskedImage(picture, picture.path, MaskSpec()) for picture in list_image_refs(spec)
        ]  # which refuses it in its words
    if not entry.masks:
        raise UserError(f"{name} has no masks; sets that have: {', '.join(k for k, v in catalog().items() if v.masks)}")
    rule = dict(entry.masks)
    source, replace, allow_missing = (rule.pop(key, None) for key in ("torchvision", "replace", "allow_missing"))
    meaning = MaskSpec(**{**rule, "classes": tuple(rule["classes"])})
    if name == "coins":
        (path,) = (picture.path for picture in list_image_refs(spec))
        parts = {split: COINS[split]} if split else COINS
        return [
            CoinsImage(ImageRef(dataset_label(spec), part, path), path, meaning, columns) for part, columns in parts.items()
        ]
    if source:
        return _of_torchvision(source, spec, meaning)
    found, pictures = [], list_image_refs(spec)
    for picture in pictures:
        mask = entry.path / re.sub(replace[0], replace[1], entry.manifest_name(picture.path))
        if mask.exists():
            found.append(MaskedImage(picture, mask, meaning))
        elif not allow_missing:
            raise DatasetNotFound(f"{picture.path} has no mask {mask}")
    if not found:
        raise DatasetNotFound(f"{spec}: none of its {len(pictures)} pictures has a mask: {entry.install_hint()}")
    return found


def _of_folder(folder: Path, meaning: MaskSpec) -> list[MaskedImage]:
    masks: dict[Path, Path] = {}
    for path in list_images(folder / "masks"):
        _add_unique(masks, path.relative_to(folder / "masks").with_suffix(""), path)
    pictures = list_images(folder / "images")
    if not pictures:
        raise DatasetNotFound(f"{folder}: no pictures in {folder / 'images'}; their masks belong into {folder / 'masks'}")
    found, names = [], dict[Path, Path]()
    for path in pictures:
        name = path.relative_to(folder / "images").with_suffix("")
        _add_unique(names, name, path)
        if name not in masks:
            raise DatasetNotFound(f"{path} has no mask {folder / 'masks' / name}.png")
        found.append(MaskedImage(ImageRef(dataset_label(str(folder)), name.as_posix(), path), masks[name], meaning))
    return found


def _add_unique(known: dict[Path, Path], name: Path, path: Path) -> None:
    if name in known:
        raise InvalidImage(f"{known[name]} and {path} have the same name; rename one")
    known[name] = path


def _of_torchvision(source: str, spec: str, meaning: MaskSpec) -> list[MaskedImage]:
    name, _, split = spec.partition("/")
    try:
        images, masks = TORCHVISION[source](get_dataset(name).path, split or "train")
    except (RuntimeError, ValueError, OSError) as error:
        raise DatasetNotFound(
            f"{spec} is not here: {get_dataset(name).install_hint()} ({str(error).splitlines()[0]})"
        ) from None
    return [
        MaskedImage(ImageRef(dataset_label(spec), Path(image).stem, Path(image)), Path(mask), meaning)
        for image, mask in zip(images, masks, strict=True)
    ]


def _voc(root: Path, split: str) -> tuple[Sequence[Any], Sequence[Any]]:
    from torchvision.datasets import VOCSegmentation

    found = VOCSegmentation(str(root), "2012", split)
    return found.images, found.masks


def _cityscapes(root: Path, split: str) -> tuple[Sequence[Any], Sequence[Any]]:
    from torchvision.datasets import Cityscapes

    found = Cityscapes(str(root), split, target_type="semantic")
    return found.images, [target[0] for target in found.targets]


def _pets(root: Path, split: str) -> tuple[Sequence[Any], Sequence[Any]]:
    from torchvision.datasets import OxfordIIITPet

    found = OxfordIIITPet(str(root), split, target_types="segmentation")
    return found._images, found._segs


TORCHVISION: dict[str, Callable[[Path, str], tuple[Sequence[Any], Sequence[Any]]]] = {
    "voc": _voc,
    "cityscapes": _cityscapes,
    "pets": _pets,
}
