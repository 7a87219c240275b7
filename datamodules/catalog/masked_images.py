"""Images with segmentation masks: find the files of a dataset or a folder."""

import csv
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_fill_holes, label
from torch import Tensor

from datamodules.catalog.catalog import CatalogEntry, DatasetNotFound, catalog, get_dataset, is_folder
from datamodules.catalog.masked_image import MaskedImage, MaskSpec, RleImage
from datamodules.errors import UserError
from datamodules.io.folders import list_images
from datamodules.io.image_io import InvalidImage, count_pages, read_image, to_channels
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs
from datamodules.transforms.downsample import downsample_image, downsample_mask

COINS = {"train": (0, 256), "val": (256, 384)}  # columns of the image


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


def list_masked_images(
    spec: str, instances: bool = False, replace: Sequence[str] | None = None, folder_spec: MaskSpec | None = None
) -> list[MaskedImage]:
    """List the images and masks of a dataset or a folder.

    Args:
        spec: dataset of the catalog, one of its splits ("camvid/train"), or a folder with subfolders `images` and `masks`,
            in which an image and its mask have the same name.
        instances: whether the masks of a folder are instance ids.
        replace: regular expression and replacement from image names to mask names; None for the dataset's masks of classes.
        folder_spec: meaning of the masks of a folder; None for ids.

    Raises:
        DatasetNotFound: images or masks are missing.
        InvalidImage: two files of a folder have the same name.
        UserError: the dataset has no masks.
    """
    if is_folder(spec):
        folder = Path(spec)
        return pair_folders(
            folder / "images", folder / "masks", dataset_label(spec), folder_spec or MaskSpec(instances=instances)
        )
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
            CoinsImage(ImageRef(dataset_label(spec), region, path), path, mask_spec, columns=columns)
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


def pair_folders(images: Path, masks: Path, dataset: str, mask_spec: MaskSpec) -> list[MaskedImage]:
    """List the images of a folder with the masks of the same names in another folder; each page of a stack is an image.

    All masks may have an ending in addition, such as `cell_7_mask` for `cell_7`.

    Args:
        images: folder of the images.
        masks: folder of the masks; a CSV file for the format "rle".
        dataset: name of the dataset in logs and records.
        mask_spec: meaning of the mask values.

    Raises:
        DatasetNotFound: there are no images, or an image has no mask.
        InvalidImage: two files have the same name, a mask has no image, or a stack has another number of pages than its mask.
    """
    candidates = list_images(images)
    if not candidates:
        raise DatasetNotFound(f"{images}: no images in this folder. Save images in it, and their masks in {masks}")
    names: dict[Path, Path] = {}
    for path in candidates:
        add_unique(names, path.relative_to(images).with_suffix(""), path)
    if mask_spec.mask_format == "rle":
        return rle_images(names, masks, dataset, mask_spec)
    masks_by_name: dict[Path, Path] = {}
    for path in list_images(masks):
        add_unique(masks_by_name, path.relative_to(masks).with_suffix(""), path)
    masks_by_name = without_ending(masks_by_name, names.keys())
    if missing := [path for name, path in names.items() if name not in masks_by_name]:
        name = missing[0].relative_to(images).with_suffix("")
        raise DatasetNotFound(
            f"{missing[0]} has no mask ({len(missing)} of {len(names)}). Save it as {masks / name}.png, or remove the image"
        )
    if unused := sorted(masks_by_name.keys() - names.keys()):
        raise InvalidImage(
            f"{masks_by_name[unused[0]]} has no image ({len(unused)} of {len(masks_by_name)} masks). Save it in {images}, or "
            "remove the mask"
        )
    return [
        masked_image
        for name, path in names.items()
        for masked_image in _pages(ImageRef(dataset, name.as_posix(), path), masks_by_name[name], mask_spec)
    ]


def without_ending(masks: dict[Path, Path], names: Set[Path]) -> dict[Path, Path]:
    """Return the masks by the names of their images, if most masks have the names of images with one ending, else unchanged.

    An ending starts with a character that separates words.
    """
    by_ending: dict[str, dict[Path, Path]] = {}
    for mask in masks:
        for i, character in enumerate(mask.name):
            if character in "_-. " and mask not in names and i and (name := mask.with_name(mask.name[:i])) in names:
                by_ending.setdefault(mask.name[i:], {})[mask] = name
    renamed: dict[Path, Path] = max(by_ending.values(), key=len, default={})
    by_name = {renamed.get(mask, mask): path for mask, path in masks.items()}
    return by_name if 2 * len(renamed) > len(masks) == len(by_name) else masks  # two masks may have the name of one image


def _pages(image: ImageRef, mask: Path, mask_spec: MaskSpec) -> list[MaskedImage]:
    pages, mask_pages = count_pages(image.path), count_pages(mask)
    if pages != mask_pages:
        raise InvalidImage(f"{mask}: {mask_pages} pages, but its image has {pages}. Save a mask for each page")
    if pages == 1:
        return [MaskedImage(image, mask, mask_spec)]
    return [MaskedImage(image._replace(name=f"{image.name}-{page:04d}"), mask, mask_spec, page) for page in range(pages)]


def rle_images(names: dict[Path, Path], table: Path, dataset: str, mask_spec: MaskSpec) -> list[MaskedImage]:
    """List images with the run lengths of a CSV file: columns for the name of the image and for its runs, as on Kaggle.

    Pixels are counted from 1, down the columns. An object is a row; an image without runs has no object.

    Raises:
        InvalidImage: the file cannot be read, names another image, or lacks one.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidImage(f"{table} cannot be read as a CSV file: {error}") from None
    if rows and len(rows[0]) > 1 and rows[0][1].strip() and all(word.isdecimal() for word in rows[0][1].split()):
        raise InvalidImage(f"{table}, line 1: run lengths in place of the names of the columns. Add a line such as name,runs")
    runs: dict[str, list[str]] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) < 2:
            raise InvalidImage(f"{table}, line {number}: {len(row)} columns. Save the name of an image and its runs")
        runs.setdefault(Path(row[0]).stem, []).extend([row[1]] if row[1].strip() else [])
    by_stem: dict[str, tuple[Path, Path]] = {}
    for name, path in names.items():  # the table names files without their folders
        if path.stem in by_stem:
            raise InvalidImage(f"{by_stem[path.stem][1]} and {path} have the same name in {table}. Rename one of them")
        by_stem[path.stem] = (name, path)
    for kind, missing in (
        ("a row, but no image", runs.keys() - by_stem.keys()),
        ("an image, but no row", by_stem.keys() - runs),
    ):
        if missing:
            raise InvalidImage(f"{table}: {min(missing)} has {kind} ({len(missing)} such names). Correct the table")
    return [
        RleImage(ImageRef(dataset, name.as_posix(), path), table, mask_spec, runs=tuple(runs[stem]))
        for stem, (name, path) in by_stem.items()
    ]


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
