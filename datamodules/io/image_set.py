"""Data sets as arrays: labelled images of one size, in memory; pictures of a folder are cut square and shrunk to it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.catalog.array_readers import read_split
from datamodules.catalog.catalog import catalog, get_dataset
from datamodules.errors import UserError
from datamodules.io.image_io import pixel_hash, read_image
from datamodules.io.image_refs import DataReport, ImageRef, dataset_label, list_image_refs


class ImageSet(NamedTuple):
    """Images of a data set."""

    pixels: Tensor  # uint8 (N, C, size, size)
    labels: Tensor  # int64 (N,)


def load_image_set(spec: str, size: int, channels: int, crop: int | None, data_report: DataReport) -> ImageSet:
    """The images that a recipe's data key names.

    Args:
        spec: a set of the catalogue ("digits"), a split of one ("mnist/train"), or a folder of pictures; the labels of
            pictures are the numbers of their folders, in order.
        size: side in pixels; images are made so large bilinearly, antialiased where they shrink.
        channels: 1 or 3; grey pictures of a folder are repeated to 3.
        crop: side of the central square that is cut from each picture first; None for the largest.
        data_report: takes note of what was read.

    Raises:
        MissingData: the set is not here.
        BadImage: pictures are unusable.
        Refused: no such split, or another number of channels.
    """
    name = spec.partition("/")[0]
    if name in catalog() and get_dataset(name).arrays:
        pixels, labels = read_split(spec)
        if pixels.shape[1] != channels:
            raise UserError(f"data.channels: {channels}, but the images of {name} have {pixels.shape[1]}")
        data_report.content_hashes[dataset_label(spec)] = {"all": pixel_hash(pixels)}
        return ImageSet(resize_uint8(pixels, size), labels)
    pictures = data_report.validate(list_image_refs(spec), crop or size)
    with ThreadPoolExecutor() as pool:
        squares = list(pool.map(lambda picture: center_crop_resize(picture.path, size, channels, crop), pictures))
    return ImageSet(torch.stack(squares), folder_labels(pictures))


def folder_labels(pictures: Sequence[ImageRef]) -> Tensor:
    """The number of each picture's folder, in the order of their names: int64 (N,)."""
    folders = sorted({picture.path.parent for picture in pictures})
    return torch.tensor([folders.index(picture.path.parent) for picture in pictures])


def center_crop_resize(path: Path, size: int, channels: int, crop: int | None) -> Tensor:
    """The central square of a picture, made `size` pixels wide: uint8 (channels, size, size)."""
    pixels = read_image(path)
    if len(pixels) > channels:
        raise UserError(f"data.channels: {channels}, but {path} is in colour")
    side = crop or min(pixels.shape[-2:])
    top, left = ((length - side) // 2 for length in pixels.shape[-2:])
    cut = pixels[:, top : top + side, left : left + side]
    return resize_uint8(cut[None], size)[0].expand(channels, -1, -1)


def resize_uint8(pixels: Tensor, size: int, at_once: int = 1024) -> Tensor:
    """uint8 images (N, C, H, W) made `size` pixels wide and high, bilinearly."""
    if tuple(pixels.shape[-2:]) == (size, size):
        return pixels
    made = []
    for part in pixels.split(at_once):
        made.append(F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8))
    return torch.cat(made)
