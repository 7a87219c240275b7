"""Compare the files of a dataset with its manifest."""

import hashlib
from collections.abc import Iterator

import numpy as np

from datamodules.catalog.array_readers import READERS
from datamodules.catalog.catalog import CatalogEntry
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage, pixel_hash, read_image


def verify(data_set: CatalogEntry) -> Iterator[str]:
    """Compare a set with its manifest; yields one line for each file that differs, is missing, cut short or unknown."""
    wanted = data_set.manifest()
    if not wanted:
        yield f"{data_set.name}: no manifest, nothing to compare with"
        return
    if data_set.arrays:
        yield from _verify_arrays(data_set, wanted)
        return
    found = {data_set.manifest_name(path): path for path in data_set.files()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            yield f"{name}: missing"
        elif name not in wanted:
            if len(wanted) >= sum(data_set.count.values()):  # else the manifest knows only some of the set's files
                yield f"{name}: not part of {data_set.name}"
        else:
            try:
                if pixel_hash(read_image(found[name])) != wanted[name][0]:
                    yield f"{name}: pixels differ from the manifest's"
            except InvalidImage as error:
                yield str(error)


def _verify_arrays(data_set: CatalogEntry, wanted: dict[str, tuple[str, str]]) -> Iterator[str]:
    for part in dict.fromkeys(bounds[0] for bounds in data_set.splits.values()):
        try:
            images, labels = READERS[data_set.name](part)
        except UserError as error:
            yield str(error)
            continue
        if len(images) != data_set.count[part]:
            yield f"{part}: {len(images)} of {data_set.count[part]} images"
        elif part in wanted and array_hash(images, labels) != wanted[part][0]:
            yield f"{part}: images or labels differ from the manifest's"


def array_hash(*arrays: np.ndarray) -> str:
    """sha256 over arrays, one after another."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
