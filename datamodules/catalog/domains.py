"""The two domains of unpaired image translation: find and read their images."""

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from datamodules.catalog.catalog import DatasetNotFound, catalog, get_dataset
from datamodules.catalog.masked_image import MaskedImage
from datamodules.catalog.masked_images import list_masked_images
from datamodules.catalog.palettes import colorize, palette
from datamodules.errors import UserError
from datamodules.io.image_io import read_image, to_channels
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs

TEXTURE_SPLITS = {"train": (0, 384), "test": (384, 512)}  # columns; each texture is one 512 x 512 image


@dataclass(frozen=True)
class DomainImage:
    """An image of a domain.

    Args:
        image: image file.
        labels: the image with its label map, if it has one.
        palette_name: dataset with the palette of the label map, if the domain consists of label maps; otherwise empty.
        columns: first column of the split and column after the last; None for all columns.
    """

    image: ImageRef
    labels: MaskedImage | None = None
    palette_name: str = ""
    columns: tuple[int, int] | None = None

    @property
    def source(self) -> str | Path:
        """File from which the pixels are read."""
        return self.labels.mask if self.labels and self.palette_name else self.image.file

    def pixels(self) -> Tensor:
        """Read the image, or color its label map: uint8 (3, H, W)."""
        if self.labels and self.palette_name:
            return colorize(self.labels.read_mask(), palette(self.palette_name))
        pixels = to_channels(read_image(self.image.path), 3)
        return pixels if self.columns is None else pixels[..., slice(*self.columns)]

    def resize_square(self, pixels: Tensor, side: int) -> Tensor:
        """Resize to (3, side, side), by bicubic interpolation for images and nearest neighbor for label maps."""
        if self.palette_name:
            return F.interpolate(pixels[None], (side, side), mode="nearest-exact")[0]
        resized = F.interpolate(pixels[None].float(), (side, side), mode="bicubic", antialias=True)
        return resized.round().clamp(0, 255).to(pixels.dtype)[0]


def load_domains(spec: str) -> tuple[list[DomainImage], list[DomainImage]]:
    """List the images of domains A and B.

    Args:
        spec: "<dataset>/train" for a dataset of the catalog with splits trainA and trainB; a split of a dataset with masks
            (its images are A, its colored label maps are B); "textures/grass2gravel/train" for two of the embedded
            textures; or "<folder>/train" for the folders `<folder>/trainA` and `<folder>/trainB`.

    Raises:
        DatasetNotFound: the images are not installed.
        UserError: the dataset does not have two domains.
    """
    spec = spec.rstrip("/")
    name, _, split = spec.partition("/")
    if name not in catalog() and (Path(spec).is_absolute() or Path(name).is_dir()):
        return _from_folder(spec, "A"), _from_folder(spec, "B")
    entry = get_dataset(name)
    if name == "textures":
        return _textures(spec)
    if entry.masks:
        palette(name)  # raises UserError for an unknown palette
        masked_images = list_masked_images(spec)
        return [DomainImage(masked_image.image, masked_image) for masked_image in masked_images], [
            DomainImage(masked_image.image, masked_image, name) for masked_image in masked_images
        ]
    if f"{split}A" not in entry.splits:
        pairs = sorted({key[:-1] for key in entry.splits if f"{key[:-1]}A" in entry.splits})
        raise UserError(
            f"{spec} does not have two domains" + (f"; use {', '.join(f'{name}/{pair}' for pair in pairs)}" if pairs else "")
        )
    a, b = (
        [DomainImage(ref._replace(dataset=dataset_label(spec))) for ref in list_image_refs(f"{spec}{domain}")]
        for domain in "AB"
    )
    return a, b


def _textures(spec: str) -> tuple[list[DomainImage], list[DomainImage]]:
    """List the images of two textures; their last columns form the test split."""
    textures = list(get_dataset("textures").splits)
    _, pair, split = [*spec.split("/"), "", ""][:3]
    a, _, b = pair.partition("2")
    if a not in textures or b not in textures or split not in TEXTURE_SPLITS or spec.count("/") != 2:
        example = f"textures/{textures[0]}2{textures[1]}/train"
        raise UserError(f"{spec}: use two of {', '.join(textures)} and {' or '.join(TEXTURE_SPLITS)}, for example {example}")
    images_a, images_b = (
        [
            DomainImage(ref._replace(dataset=dataset_label(spec)), columns=TEXTURE_SPLITS[split])
            for ref in list_image_refs(f"textures/{name}")
        ]
        for name in (a, b)
    )
    return images_a, images_b


def _from_folder(spec: str, domain: str) -> list[DomainImage]:
    folder = Path(spec + domain)
    if not folder.is_dir():
        raise DatasetNotFound(
            f"{spec}: no folder {folder}. Save the two domains in {folder.with_name(folder.name[:-1])}A and ...B"
        )
    return [DomainImage(image._replace(dataset=dataset_label(spec))) for image in list_image_refs(str(folder))]
