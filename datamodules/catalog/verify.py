"""Verify the files of a dataset against its manifest."""

import hashlib
from collections.abc import Iterator

import numpy as np

from datamodules.catalog.array_readers import READERS
from datamodules.catalog.catalog import CatalogEntry
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage, pixel_hash, read_image


def verify(dataset: CatalogEntry) -> Iterator[str]:
    """Compare a dataset with its manifest, and yield a line for each changed, missing, damaged or unknown file."""
    expected = dataset.manifest()
    if not expected:
        yield f"{dataset.name}: no manifest, the files cannot be verified"
        return
    if dataset.arrays:
        yield from _verify_arrays(dataset, expected)
        return
    files_by_name = {dataset.manifest_name(path): path for path in dataset.files()}
    for name in sorted(expected.keys() | files_by_name.keys()):
        if name not in files_by_name:
            yield f"{name}: missing"
        elif name not in expected:
            if len(expected) >= sum(dataset.count.values()):  # else the manifest is partial
                yield f"{name}: not part of {dataset.name}"
        else:
            try:
                if pixel_hash(read_image(files_by_name[name])) != expected[name][0]:
                    yield f"{name}: pixels differ from the manifest"
            except InvalidImage as error:
                yield str(error)


def _verify_arrays(dataset: CatalogEntry, expected: dict[str, tuple[str, str]]) -> Iterator[str]:
    for subset in dict.fromkeys(bounds[0] for bounds in dataset.splits.values()):
        try:
            images, labels = READERS[dataset.name](subset)
        except UserError as error:
            yield str(error)
            continue
        if len(images) != dataset.count[subset]:
            yield f"{subset}: {len(images)} of {dataset.count[subset]} images"
        elif subset in expected and array_hash(images, labels) != expected[subset][0]:
            yield f"{subset}: images or labels differ from the manifest"


def array_hash(*arrays: np.ndarray) -> str:
    """Return the sha256 of the concatenated bytes of arrays."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
