"""Images with segmentation masks: find the files, and map mask values to classes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import binary_fill_holes, label
from torch import Tensor

from datamodules.catalog.catalog import CatalogEntry, DatasetNotFound, catalog, get_dataset, is_folder
from datamodules.errors import UserError
from datamodules.io.folders import list_images
from datamodules.io.image_io import InvalidImage, open_image, read_image, to_channels
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs
from datamodules.transforms.downsample import downsample_image, downsample_mask

COINS = {"train": (0, 256), "val": (256, 384)}  # columns of the image


@dataclass(frozen=True)
class MaskSpec:
    """Meaning of the values of a dataset's masks.

    Args:
        classes: class names in the order of their ids; empty if unknown.
        value_map: mask value -> class id; empty if the values are class ids.
        default_class: class id of all other values; None to raise an error for them.
        instances: whether the values are instance ids, 0 for the background; the classes are background and object.
    """

    classes: tuple[str, ...] = ()
    value_map: dict[int, int] = field(default_factory=dict)
    default_class: int | None = None
    instances: bool = False


class MaskedSample(NamedTuple):
    """A decoded image and its mask."""

    pixels: Tensor  # uint8 (C, H, W)
    mask: np.ndarray  # uint8 (H, W): class ids; 1 for every object of an instance mask
    instance_ids: np.ndarray  # int32 (H, W): 0 for the background; without instance masks, connected components of class 1
    instances: bool


@dataclass(frozen=True)
class MaskedImage:
    """An image file, its mask file, and the meaning of the mask values."""

    image: ImageRef
    mask: Path
    mask_spec: MaskSpec

    def read(self, channels: int, downscale: int = 1) -> tuple[Tensor, np.ndarray]:
        """Read the image, uint8 (channels, H, W), and the mask (H, W) of `read_mask`, both reduced by the factor `downscale`.

        Raises:
            InvalidImage: one of them is unusable, or their sizes differ.
        """
        pixels, values = read_image(self.image.path), self.read_mask()
        if pixels.shape[-2:] != values.shape:
            mask_size, image_size = (f"{shape[1]}x{shape[0]}" for shape in (values.shape, pixels.shape[-2:]))
            raise InvalidImage(f"{self.mask}: {mask_size} pixels, but its image has {image_size}. Save both at the same size")
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
        values = np.asarray(open_image(self.mask))
        if values.ndim != 2:
            raise InvalidImage(f"{self.mask}: a color image, not class ids. Save one integer per pixel")
        if values.dtype.kind == "f" or values.min() < 0:
            raise InvalidImage(f"{self.mask}: fractions or negative numbers, not ids. Save integers from 0")
        values = values.astype(np.int32)
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


@dataclass(frozen=True)
class CoinsImage(MaskedImage):
    """A range of columns of scikit-image's coins image; the mask is computed as in scikit-image's segmentation example."""

    columns: tuple[int, int] = (0, 384)

    def read(self, channels: int, downscale: int = 1) -> tuple[Tensor, np.ndarray]:
        """See `MaskedImage`."""
        pixels = read_image(self.image.path)
        region = slice(*self.columns)
        values = label(coins_mask(self.image.path)[:, region])[0].astype(np.int32)
        return downsample_image(to_channels(pixels[..., region], channels), downscale), downsample_mask(values, downscale)

    def read_mask(self) -> np.ndarray:
        """See `MaskedImage`."""
        return self.read(1)[1]


@cache
def coins_mask(path: Path) -> np.ndarray:
    """Segment the coins by a watershed of the edges with dark and bright markers: bool (H, W)."""
    from skimage.filters import sobel
    from skimage.morphology import remove_small_objects
    from skimage.segmentation import watershed

    gray = read_image(path)[0].numpy()
    markers = np.select([gray < 30, gray > 150], [1, 2], 0)
    coins = binary_fill_holes(watershed(sobel(gray), markers) == 2)
    return remove_small_objects(coins, max_size=500)


def list_masked_images(spec: str, instances: bool = False, replace: Sequence[str] | None = None) -> list[MaskedImage]:
    """List the images and masks of a dataset or a folder.

    Args:
        spec: dataset of the catalog, one of its splits ("camvid/train"), or a folder with subfolders `images` and `masks`,
            in which an image and its mask have the same name.
        instances: whether the masks of a folder are instance ids.
        replace: regular expression and replacement from image names to mask names; None for the dataset's masks of classes.

    Raises:
        DatasetNotFound: images or masks are missing.
        InvalidImage: two files of a folder have the same name.
        UserError: the dataset has no masks.
    """
    if is_folder(spec):
        return _from_folder(Path(spec), MaskSpec(instances=instances))
    name, _, split = spec.partition("/")
    entry = get_dataset(name) if name in catalog() else None
    if entry is None:
        # `list_image_refs` raises the error for an unknown name.
        return [MaskedImage(image, image.path, MaskSpec()) for image in list_image_refs(spec)]
    if replace:
        return _pair(spec, entry, replace, MaskSpec(instances=True), allow_missing=False)
    if not entry.masks:
        raise UserError(f"{name} has no masks. Datasets with masks: {', '.join(k for k, v in catalog().items() if v.masks)}")
    options = dict(entry.masks)
    source, pattern, allow_missing = (options.pop(key, None) for key in ("torchvision", "replace", "allow_missing"))
    mask_spec = MaskSpec(**{**options, "classes": tuple(options["classes"])})
    if name == "coins":
        (path,) = (image.path for image in list_image_refs(spec))
        regions = {split: COINS[split]} if split else COINS
        return [
            CoinsImage(ImageRef(dataset_label(spec), region, path), path, mask_spec, columns)
            for region, columns in regions.items()
        ]
    if source:
        return _from_torchvision(source, spec, mask_spec)
    return _pair(spec, entry, pattern, mask_spec, allow_missing)


def _pair(
    spec: str, entry: CatalogEntry, pattern: Sequence[str], mask_spec: MaskSpec, allow_missing: bool
) -> list[MaskedImage]:
    dataset, candidates = [], list_image_refs(spec)
    for image in candidates:
        mask = entry.path / re.sub(pattern[0], pattern[1], entry.manifest_name(image.path))
        if mask.exists():
            dataset.append(MaskedImage(image, mask, mask_spec))
        elif not allow_missing:
            raise DatasetNotFound(f"{image.path} has no mask {mask}. To install: {entry.install_hint()}")
    if not dataset:
        raise DatasetNotFound(f"{spec}: none of its {len(candidates)} images has a mask. To install: {entry.install_hint()}")
    return dataset


def _from_folder(folder: Path, mask_spec: MaskSpec) -> list[MaskedImage]:
    masks: dict[Path, Path] = {}
    for path in list_images(folder / "masks"):
        add_unique(masks, path.relative_to(folder / "masks").with_suffix(""), path)
    candidates = list_images(folder / "images")
    if not candidates:
        raise DatasetNotFound(
            f"{folder}: no images in {folder / 'images'}. Save images in this folder, and their masks in {folder / 'masks'}"
        )
    dataset, names = [], dict[Path, Path]()
    for path in candidates:
        name = path.relative_to(folder / "images").with_suffix("")
        add_unique(names, name, path)
        if name not in masks:
            raise DatasetNotFound(f"{path} has no mask. Save it as {folder / 'masks' / name}.png, or remove the image")
        dataset.append(MaskedImage(ImageRef(dataset_label(str(folder)), name.as_posix(), path), masks[name], mask_spec))
    return dataset


def add_unique(paths_by_name: dict[Path, Path], name: Path, path: Path) -> None:
    """Add the path of a file under its name.

    Raises:
        InvalidImage: another file has the same name.
    """
    if name in paths_by_name:
        raise InvalidImage(f"{paths_by_name[name]} and {path} have the same name. Rename one of them")
    paths_by_name[name] = path


def _from_torchvision(source: str, spec: str, mask_spec: MaskSpec) -> list[MaskedImage]:
    name, _, split = spec.partition("/")
    try:
        images, masks = TORCHVISION[source](get_dataset(name).path, split or "train")
    except (RuntimeError, ValueError, OSError) as error:
        raise DatasetNotFound(
            f"{spec} is not installed. To install: {get_dataset(name).install_hint()} ({str(error).splitlines()[0]})"
        ) from None
    return [
        MaskedImage(ImageRef(dataset_label(spec), Path(image_path).stem, Path(image_path)), Path(mask), mask_spec)
        for image_path, mask in zip(images, masks, strict=True)
    ]


def _voc(root: Path, split: str) -> tuple[Sequence[Any], Sequence[Any]]:
    from torchvision.datasets import VOCSegmentation

    dataset = VOCSegmentation(str(root), "2012", split)
    return dataset.images, dataset.masks


def _cityscapes(root: Path, split: str) -> tuple[Sequence[Any], Sequence[Any]]:
    from torchvision.datasets import Cityscapes

    dataset = Cityscapes(str(root), split, target_type="semantic")
    return dataset.images, [target[0] for target in dataset.targets]


def _pets(root: Path, split: str) -> tuple[Sequence[Any], Sequence[Any]]:
    from torchvision.datasets import OxfordIIITPet

    dataset = OxfordIIITPet(str(root), split, target_types="segmentation")
    return dataset._images, dataset._segs


TORCHVISION: dict[str, Callable[[Path, str], tuple[Sequence[Any], Sequence[Any]]]] = {
    "voc": _voc,
    "cityscapes": _cityscapes,
    "pets": _pets,
}
