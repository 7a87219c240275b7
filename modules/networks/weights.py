"""Weights files of pretrained networks."""

import struct
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from datamodules.errors import UserError

# Raised by torch.load and safetensors for a damaged file, or one of another format.
LOAD_ERRORS = (
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    UnpicklingError,
    struct.error,
    SafetensorError,
)


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of another file by torch; no other objects are unpickled.

    Raises:
        UserError: the file is damaged, or contains objects other than tensors.
    """
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *LOAD_ERRORS) as error:
        raise UserError(f"{path} cannot be read as weights: {' '.join(str(error).split())}. Replace the file") from None
