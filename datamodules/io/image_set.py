"""Labeled images of one size in memory, from array datasets or folders (center-cropped and resized)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.catalog.array_readers import read_split
from datamodules.catalog.catalog import catalog, get_dataset
from datamodules.errors import UserError
from datamodules.io.decoded_cache import decode_images
from datamodules.io.folders import is_hidden
from datamodules.io.image_io import InvalidImage, check_size, pixel_hash, read_image
from datamodules.io.image_refs import DataReport, ImageRef, list_image_refs, parent_of


class ImageSet(NamedTuple):
    """Images and labels of a dataset."""

    pixels: Tensor  # uint8 (N, C, size, size)
    labels: Tensor  # int64 (N,)


class Square(NamedTuple):
    """Square part of an image that is used.

    Args:
        side: side in pixels; None for the largest square.
        center_xy: horizontal and vertical position of its center in pixels; None for the center of the image.
    """

    side: int | None = None
    center_xy: tuple[int, int] | None = None


def load_image_set(
    spec: str,
    size: int,
    channels: int,
    square: Square,
    data_report: DataReport,
    max_images: int | None = None,
    class_names: Sequence[str] = (),
) -> ImageSet:
    """Load the images and labels of a dataset or a folder.

    Args:
        spec: dataset of the catalog ("digits"), one of its splits ("mnist/train"), or a folder of images. The label of an
            image file is the index of its folder in sorted order.
        size: side in pixels; images are resized by antialiased bilinear interpolation.
        channels: 1 or 3; grayscale image files are repeated to 3 channels.
        square: part of image files that is resized.
        data_report: report that collects content hashes and skipped files.
        max_images: number of images that are read, a random subset; None for all.
        class_names: names of the classes of another set, see `folder_labels`.

    Raises:
        DatasetNotFound: the dataset is not installed.
        InvalidImage: images are unusable.
        UserError: unknown split, a different number of channels, or a size of at least twice that of an array dataset.
    """
    name = spec.partition("/")[0]
    if name in catalog() and get_dataset(name).arrays:
        pixels, labels = read_split(spec)
        if pixels.shape[1] != channels:
            raise UserError(f"data.channels: {channels}, but the images of {name} have {pixels.shape[1]}. Change data.channels")
        if size >= 2 * min(pixels.shape[2:]):
            sides = f"{pixels.shape[3]}x{pixels.shape[2]}"
            raise UserError(f"data.size: {size} is too large for the images of {name}, {sides} pixels. Use a smaller size")
        data_report.add_array(spec, pixels)
        used = random_subset(len(pixels), max_images)
        return ImageSet(resize_uint8(pixels[used], size), labels[used])
    refs = list_image_refs(spec)
    refs = [refs[i] for i in random_subset(len(refs), max_images).tolist()]

    def read(number: int) -> tuple[Tensor, str]:
        path = refs[number].path
        pixels = read_image(path)
        check_size(pixels.shape[-1], pixels.shape[-2], path, square.side or size)
        return take_square(path, pixels, size, channels, square), pixel_hash(pixels)

    decoded = decode_images([ref.file for ref in refs], f"{square} of {size} pixels, {channels} channels", read)
    usable = data_report.add_results(refs, decoded.results)
    return ImageSet(decoded.pixels.view(-1, channels, size, size), folder_labels(usable, class_names=class_names))


def folder_class_names(spec: str) -> list[str]:
    """Return the names of the classes of a set of image files, which are the names of their folders; () for arrays."""
    name = spec.partition("/")[0]
    if name in catalog() and get_dataset(name).arrays:
        return []
    return sorted(set(folder_names(list_image_refs(spec))))


def folder_names(refs: Sequence[ImageRef]) -> list[str]:
    """Return the name of each image's folder, its class."""
    parents = [parent_of(ref.file) for ref in refs]
    names = {parent: Path(parent).name for parent in set(parents)}
    return [names[parent] for parent in parents]


def random_subset(count: int, max_items: int | None) -> Tensor:
    """Return the indices of a fixed random subset of `count` items, in order: int64 (min(count, max_items),)."""
    if max_items is None or max_items >= count:
        return torch.arange(count)
    return random_order(count)[:max_items].sort().values


def random_order(count: int) -> Tensor:
    """Return a fixed random order of `count` items, for parts of a set that is sorted, such as by class: int64 (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def class_folders(refs: Sequence[ImageRef]) -> list[Path]:
    """Return the folders of images and the folders next to them, sorted: a folder of each class, as in `ImageFolder`."""
    own = {Path(parent).absolute() for parent in {parent_of(ref.file) for ref in refs}}
    readable = {folder.parent for folder in own if os.access(folder.parent, os.R_OK | os.X_OK)}
    siblings = {folder for parent in readable for folder in parent.iterdir() if folder.is_dir() and not is_hidden(folder.name)}
    return sorted(own | siblings)


def folder_labels(refs: Sequence[ImageRef], folders: Sequence[Path] | None = None, class_names: Sequence[str] = ()) -> Tensor:
    """Return the index of each image's folder, its class: int64 (N,).

    Args:
        refs: images.
        folders: all folders, such as those of `class_folders`; None for those of the images, sorted.
        class_names: names of the classes of another set. If a folder has such a name, classes are numbered by name, as in that
            set, and other names follow. A set that lacks a class then has the labels of the other set.
    """
    parents = [parent_of(ref.file) for ref in refs]
    own = {parent: Path(parent).absolute() for parent in set(parents)}
    everything = list(folders or sorted(set(own.values())))
    names = [folder.name for folder in everything]
    numbers = {folder: i for i, folder in enumerate(everything)}
    if set(names) & set(class_names):
        known = [*class_names, *sorted(set(names) - set(class_names))]
        numbers = {folder: known.index(folder.name) for folder in everything}
    labels = {parent: numbers[folder] for parent, folder in own.items()}
    return torch.tensor([labels[parent] for parent in parents])


def read_square(path: Path, size: int, channels: int, square: Square) -> Tensor:
    """Read a square part of an image file and resize it: uint8 (channels, size, size).

    Raises:
        InvalidImage: see `open_image`; or the square is not inside the image.
        UserError: the image has more than `channels` channels.
    """
    return take_square(path, read_image(path), size, channels, square)


def take_square(path: Path, pixels: Tensor, size: int, channels: int, square: Square) -> Tensor:
    """Return a square part of the pixels (C, H, W) of an image file, see `read_square`."""
    if len(pixels) > channels:
        raise UserError(
            f"data.channels: {channels}, but {path} is a color image. Set data.channels to 3, or convert it to grayscale"
        )
    height, width = pixels.shape[-2:]
    side = square.side or min(height, width)
    left, top = ((width - side) // 2, (height - side) // 2)
    if square.center_xy:
        left, top = (position - side // 2 for position in square.center_xy)
    if min(left, top) < 0 or left + side > width or top + side > height:
        raise InvalidImage(
            f"{path}: {width}x{height} pixels, data.crop {side} at data.crop_center {square.center_xy} is not inside"
        )
    return resize_uint8(pixels[None, :, top : top + side, left : left + side], size)[0].expand(channels, -1, -1)


def box_downsample(pixels: Tensor, size: int) -> Tensor:
    """Downsample uint8 images (N, C, H, H) to (N, C, size, size), where size divides H: means of squares, rounded."""
    if pixels.shape[-1] == size:
        return pixels
    return F.avg_pool2d(pixels.float(), pixels.shape[-1] // size).round().to(torch.uint8)


def resize_uint8(pixels: Tensor, size: int, chunk_size: int = 1024) -> Tensor:
    """Resize uint8 images (N, C, H, W) to (N, C, size, size) by antialiased bilinear interpolation."""
    if tuple(pixels.shape[-2:]) == (size, size):
        return pixels
    resized = []
    for chunk in pixels.split(chunk_size):
        resized.append(F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8))
    return torch.cat(resized)
