"""Names and validation of the images of a dataset."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import commonpath
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from datamodules.catalog.catalog import resolve_image_names
from datamodules.io.image_io import InvalidImage, check_size, note_on_losses, pixel_hash, probe_image, read_image

NOTED = 1000  # files of a dataset whose bits are compared with those that are read: this opens each file


class ImageRef(NamedTuple):
    """An image file with its dataset and name in logs and records.

    Args:
        dataset, name: see above.
        file: path of the file; those of large datasets are strings, which are made faster than `Path` objects.
    """

    dataset: str
    name: str
    file: str | Path

    @property
    def path(self) -> Path:
        """Path of the file."""
        return Path(self.file)


def list_image_refs(spec: str, scale: int | None = None) -> list[ImageRef]:
    """List the images of a dataset or a folder, with unique names.

    The name is the file's stem if it is unique, otherwise the path relative to the common folder.

    Args:
        spec, scale: see `resolve_images`, which also documents the errors.
    """
    files = resolve_image_names(spec, scale)
    stems = [_stem(file) for file in files]
    counts, label = Counter(stems), dataset_label(spec)
    root = commonpath(set(map(parent_of, files))) if len(counts) < len(files) else ""
    return [
        ImageRef(label, printable(stem if counts[stem] == 1 else file.removeprefix(root).lstrip(os.sep)), file)
        for stem, file in zip(stems, files, strict=True)
    ]


def parent_of(file: str | Path) -> str:
    """Return the folder of a file; faster than that of a `Path`."""
    folder, separator, _ = os.fspath(file).rpartition(os.sep)
    return folder or separator


def _stem(file: str) -> str:
    """Return the name of a file without its suffix; faster than that of a `Path`."""
    name = file.rpartition(os.sep)[2]
    return name.rpartition(".")[0] or name


def printable(name: str) -> str:
    """Return a file name with the bytes that are not UTF-8 as escapes, so that it can be written."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def dataset_label(spec: str) -> str:
    """Return the name of a dataset in logs and records.

    Slashes become dashes: "photographs-test" for "photographs/test". An absolute path has the name of its folder.
    """
    return printable(Path(spec).name if Path(spec).is_absolute() else spec.strip("./").replace("/", "-"))


class DataReport:
    """Validation results and content hashes of the images of a run.

    Args:
        skip_bad: skip unusable files instead of raising an error.
    """

    def __init__(self, skip_bad: bool = False) -> None:
        self.skip_bad = skip_bad
        self.skipped: list[str] = []
        self.notes: list[str] = []  # remarks on images that are usable, but probably not as intended
        self.content_hashes: dict[str, dict[str, str]] = {}
        self.array_lengths: dict[str, int] = {}  # images of datasets that are arrays; they have one hash

    def validate(self, refs: Sequence[ImageRef], min_size: int, decode: bool = True) -> list[ImageRef]:
        """Return the usable images.

        Args:
            refs: images to check.
            min_size: minimum width and height in pixels.
            decode: whether to decode every image. Otherwise only the header and the end of each file are read, which
                detects empty, truncated and too small files and files that are not images.

        Raises:
            InvalidImage: an image is unusable and `skip_bad` is off, or no image is usable.
        """
        with ThreadPoolExecutor() as pool:
            return self.add_results(refs, list(pool.map(lambda ref: _inspect(ref.path, min_size, decode), refs)))

    def add_results(self, refs: Sequence[ImageRef], results: Sequence[tuple[str, str]]) -> list[ImageRef]:
        """Return the usable images.

        Args:
            refs: images that were checked.
            results: for each, the reason why it is unusable (empty if it is usable), and its content hash.

        Raises:
            InvalidImage: see `validate`.
        """
        usable, reasons = [], []
        for ref, (reason, content_hash) in zip(refs, results, strict=True):
            if reason:
                reasons.append(reason)
            else:
                usable.append(ref)
                self.content_hashes.setdefault(ref.dataset, {})[ref.name] = content_hash
        if reasons and not self.skip_bad:
            raise InvalidImage(
                f"{len(reasons)} of {len(refs)} images cannot be used (--data.skip_bad true skips them): {'; '.join(reasons)}"
            )
        if not usable:
            raise InvalidImage(f"no image can be used: {'; '.join(reasons)}")
        self.skipped += reasons
        self.note_losses(usable[0].dataset, [ref.path for ref in usable[:NOTED]])
        return usable

    def add_array(self, spec: str, pixels: Tensor) -> None:
        """Add the images of a dataset that is an array, uint8 (N, C, H, W)."""
        self.content_hashes[dataset_label(spec)] = {"all": pixel_hash(pixels)}
        self.array_lengths[dataset_label(spec)] = len(pixels)

    def note_losses(self, dataset: str, paths: Iterable[Path]) -> None:
        """Add a remark if the images of a dataset have more bits than are read."""
        if note := note_on_losses(paths):
            self.notes.append(f"{dataset}: {note}")

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of the names and contents of the usable images, by dataset name."""
        return {
            dataset: hashlib.sha256(repr(sorted(refs.items())).encode()).hexdigest()[:16]
            for dataset, refs in self.content_hashes.items()
        }


def _inspect(path: Path, min_size: int, decode: bool) -> tuple[str, str]:
    """Return the reason why an image is unusable (empty if it is usable), and its content hash."""
    try:
        if not decode:
            return "", probe_image(path, min_size)
        pixels = read_image(path)
        check_size(pixels.shape[-1], pixels.shape[-2], path, min_size)
    except InvalidImage as error:
        return str(error), ""
    return "", pixel_hash(pixels)
