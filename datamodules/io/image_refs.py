"""The pictures of a data set: what each is called, and whether it can be used."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import commonpath
from pathlib import Path
from typing import NamedTuple

from datamodules.catalog.catalog import resolve_images
from datamodules.io.image_io import InvalidImage, check_size, pixel_hash, probe_image, read_image


class ImageRef(NamedTuple):
    """A picture file with the names under which logs and records know it."""

    data_set: str
    name: str
    path: Path


def list_image_refs(spec: str, scale: int | None = None) -> list[ImageRef]:
    """The pictures that a recipe's data key names, see `catalog.resolve_images`; no two have the same name.

    A picture is called by its file's stem where that is its own, else by its path below the folder of them all.
    """
    paths = resolve_images(spec, scale)
    stems = Counter(path.stem for path in paths)
    top = commonpath([path.parent for path in paths])
    return [
        ImageRef(dataset_label(spec), path.stem if stems[path.stem] == 1 else path.relative_to(top).as_posix(), path)
        for path in paths
    ]


def dataset_label(spec: str) -> str:
    """What a data key is called in logs and records: "photographs/test" gives "photographs-test", a folder its name."""
    return Path(spec).name if Path(spec).is_absolute() else spec.strip("./").replace("/", "-")


class DataReport:
    """What a look at the pictures of a run has found.

    Args:
        skip_bad: leave unusable files out instead of refusing to start.
    """

    def __init__(self, skip_bad: bool = False) -> None:
        self.skip_bad = skip_bad
        self.skipped: list[str] = []
        self.content_hashes: dict[str, dict[str, str]] = {}

    def validate(self, pictures: Sequence[ImageRef], minimum: int, whole: bool = True) -> list[ImageRef]:
        """The pictures that can be used.

        Args:
            pictures: what to look at.
            minimum: pixels that each must be wide and high.
            whole: decode each. Else headers and ends of the files are read, in a fraction of a millisecond each,
                which finds all that is empty, cut short, too small, or no picture.

        Raises:
            BadImage: some cannot be used, and that was not allowed for; or none can.
        """
        with ThreadPoolExecutor() as pool:
            looks = list(pool.map(lambda picture: _inspect(picture.path, minimum, whole), pictures))
        good, reasons = [], []
        for picture, (reason, content) in zip(pictures, looks, strict=True):
            if reason:
                reasons.append(reason)
            else:
                good.append(picture)
                self.content_hashes.setdefault(picture.data_set, {})[picture.name] = content
        if reasons and not self.skip_bad:
            raise InvalidImage(
                f"{len(reasons)} of {len(pictures)} pictures cannot be used "
                f"(--data.skip_bad true leaves them out): {'; '.join(reasons)}"
            )
        if not good:
            raise InvalidImage(f"no picture can be used: {'; '.join(reasons)}")
        self.skipped += reasons
        return good

    def fingerprints(self) -> dict[str, str]:
        """For each data set, a hash over the names and contents of its usable pictures."""
        return {
            data_set: hashlib.sha256(repr(sorted(pictures.items())).encode()).hexdigest()[:16]
            for data_set, pictures in self.content_hashes.items()
        }


def _inspect(path: Path, minimum: int, whole: bool) -> tuple[str, str]:
    """Why a picture cannot be used (empty if it can), and what identifies its content."""
    try:
        if not whole:
            return "", probe_image(path, minimum)
        pixels = read_image(path)
        check_size(pixels.shape[-1], pixels.shape[-2], path, minimum)
    except InvalidImage as error:
        return str(error), ""
    return "", pixel_hash(pixels)
