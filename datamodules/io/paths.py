"""Where files are looked for."""

import os
from pathlib import Path

from datamodules.errors import UserError

PROJECT = Path(__file__).parents[2]


def data_root() -> Path:
    """Folder of all datasets: the environment variable DARKROOM_DATA, else `data` in the current folder."""
    return Path(os.environ.get("DARKROOM_DATA", "data"))


def find_file(path: str, option: str) -> Path:
    """Find a file below the current folder, the data root, or the project, in this order.

    Args:
        path: absolute path, or path below one of them.
        option: name of the option that gave the path, for the message.

    Raises:
        UserError: the file does not exist.
    """
    for candidate in (Path(path), data_root() / path, PROJECT / path):
        if candidate.is_file():
            return candidate
    raise UserError(f"{option}: no file {path} here, in {data_root()} or in the project; check the path")
