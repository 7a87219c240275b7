"""Weights files of pretrained networks: location and download."""

from pathlib import Path

import torch

from datamodules.errors import UserError
from datamodules.io.paths import find_file
from modules.networks.weights import read_weights_file


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
        raise UserError(f"weights of {name}: they cannot be downloaded. Name a file")
    else:
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not file.is_file():
            _download(name, url, file)
    read_weights_file(file)
    return file


def _download(name: str, url: str, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: wrong checksum
        raise UserError(
            f"weights of {name}: download from {url} failed ({error}). Save the file as {file}, or name another file"
        ) from None
