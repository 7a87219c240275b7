"""Weights files of pretrained networks: location, download and reading."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from datamodules.errors import UserError
from datamodules.io.paths import find_file

READ_ERRORS = (OSError, EOFError, ValueError, TypeError, RuntimeError, UnpicklingError, SafetensorError)


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of another file by torch; no other objects are unpickled.

    Raises:
        UserError: the file is damaged, or contains objects other than tensors.
    """
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        raise UserError(f"{path} cannot be read as weights: {' '.join(str(error).split())}. Replace the file") from None


def find_or_download(name: str, url: str | None, path: str | None) -> Path:
    """Return a weights file: `path`, or the file in torch's cache, downloaded if it is missing.

    Args:
        name: name of the network, for messages.
        url: address of the file; the name of the file ends with the first digits of its sha256.
        path: path, see `find_file`; None for the file in torch's cache.

    Raises:
        UserError: the file is missing and cannot be downloaded, is damaged, or contains objects other than tensors.
    """
    if path is not None:
        file = find_file(path, f"weights of {name}")
    elif url is None:
        raise UserError(f"weights of {name}: they cannot be downloaded. Set `weights` to a file")
    else:
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not file.is_file():
            _download(name, url, file)
    read_weights_file(file)
    return file


def _download(name: str, url: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: wrong checksum
        raise UserError(
            f"weights of {name}: download from {url} failed ({error}). Save the file as {file}, set `weights` to a file, or "
            "set `on_missing_weights: skip`"
        ) from None
