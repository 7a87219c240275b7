"""Two domains of pictures of which no two belong together: where each one's pictures are, and how they are read."""

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from datamodules.catalog.catalog import DatasetNotFound, catalog, get_dataset
from datamodules.catalog.masked_images import MaskedImage, list_masked_images
from datamodules.catalog.palettes import colorize, palette
from datamodules.errors import UserError
from datamodules.io.image_io import read_image, to_channels
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs

TEXTURE_SPLITS = {"train": (0, 384), "test": (384, 512)}  # of the textures, which are one picture of 512 x 512 each


@dataclass(frozen=True)
class DomainImage:
    """A picture of a domain.

    Args:
        picture: its file.
        labels: its labels, where it has some.
        colours: the set in whose colours these are what the domain consists of; else the picture is.
        columns: the part of it that belongs to the split.
    """

    picture: ImageRef
    labels: MaskedImage | None = None
    colours: str = ""
    columns: tuple[int, int] | None = None

    def pixels(self) -> Tensor:
        """uint8 (3, H, W)."""
        if self.labels and self.colours:
            return colorize(self.labels.read_mask(), palette(self.colours))
        pixels = to_channels(read_image(self.picture.path), 3)
        return pixels if self.columns is None else pixels[..., slice(*self.columns)]

    def resize_square(self, pixels: Tensor, side: int) -> Tensor:
        """The same made `side` pixels wide and high: pictures bicubically, labels by what is nearest."""
        if self.colours:
            return F.interpolate(pixels[None], (side, side), mode="nearest-exact")[0]
        made = F.interpolate(pixels[None].float(), (side, side), mode="bicubic", antialias=True)
        return made.round().clamp(0, 255).to(pixels.dtype)[0]


def load_domains(spec: str) -> tuple[list[DomainImage], list[DomainImage]]:
    """The pictures of A and of B.

    Args:
        spec: "<set>/train" of a set of the catalogue whose splits are trainA and trainB; a split of a set with masks, whose
            photographs are A and whose label maps, in the set's colours, are B; "textures/grass2gravel/train" for two of
            the embedded textures; or "<folder>/train" beside whose place there are the folders `<folder>/trainA` and
            `<folder>/trainB`.

    Raises:
        MissingData: they are not here.
        Refused: the set has no two domains.
    """
    spec = spec.rstrip("/")
    name, _, split = spec.partition("/")
    if name not in catalog() and (Path(spec).is_absolute() or Path(name).is_dir()):
        return _of_folder(spec, "A"), _of_folder(spec, "B")
    entry = get_dataset(name)
    if name == "textures":
        return _textures(spec)
    if entry.masks:
        palette(name)  # which must be known
        found = list_masked_images(spec)
        return [DomainImage(one.picture, one) for one in found], [DomainImage(one.picture, one, name) for one in found]
    if f"{split}A" not in entry.splits:
        pairs = sorted({key[:-1] for key in entry.splits if f"{key[:-1]}A" in entry.splits})
        raise UserError(
            f"{spec} has no two domains" + (f"; take {', '.join(f'{name}/{pair}' for pair in pairs)}" if pairs else "")
        )
    a, b = (
        [DomainImage(p._replace(data_set=dataset_label(spec))) for p in list_image_refs(f"{spec}{domain}")] for domain in "AB"
    )
    return a, b


def _textures(spec: str) -> tuple[list[DomainImage], list[DomainImage]]:
    """Two textures, whose last columns are for tests."""
    known = list(get_dataset("textures").splits)
    _, pair, split = [*spec.split("/"), "", ""][:3]
    a, _, b = pair.partition("2")
    if a not in known or b not in known or split not in TEXTURE_SPLITS or spec.count("/") != 2:
        example = f"textures/{known[0]}2{known[1]}/train"
        raise UserError(f"{spec}: two of {', '.join(known)} and {' or '.join(TEXTURE_SPLITS)}, as in {example}")
    of_a, of_b = (
        [
            DomainImage(p._replace(data_set=dataset_label(spec)), columns=TEXTURE_SPLITS[split])
            for p in list_image_refs(f"textures/{name}")
        ]
        for name in (a, b)
    )
    return of_a, of_b


def _of_folder(spec: str, domain: str) -> list[DomainImage]:
    folder = Path(spec + domain)
    if not folder.is_dir():
        raise DatasetNotFound(
            f"{spec}: no folder {folder}; the two domains belong into {folder.with_name(folder.name[:-1])}A and ...B"
        )
    return [DomainImage(picture._replace(data_set=dataset_label(spec))) for picture in list_image_refs(str(folder))]
