"""Locations and hashes of input files."""

import hashlib
import os
from pathlib import Path

from datamodules.errors import UserError

PROJECT = Path(__file__).parents[2]


def data_root() -> Path:
    """Return the folder of all datasets: the environment variable DARKROOM_DATA, else `data` in the current folder."""
    return Path(os.environ.get("DARKROOM_DATA", "data"))


def cache_dir() -> Path:
    """Return the folder of what can be computed again: DARKROOM_CACHE if set, otherwise the user's cache folder."""
    import pooch

    return Path(os.environ.get("DARKROOM_CACHE") or pooch.os_cache("darkroom"))


def find_file(path: str, option: str) -> Path:
    """Find a file below the current folder, the data root, or the project, in this order.

    Args:
        path: absolute path, or path relative to one of these folders.
        option: name of the option that gave the path, for the message.

    Raises:
        UserError: the file does not exist.
    """
    for candidate in (Path(path), data_root() / path, PROJECT / path):
        if candidate.is_file():
            return candidate
    raise UserError(f"{option}: no file {path} in the current folder, {data_root()} or the project. Check the path")


def file_hash(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
