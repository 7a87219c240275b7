"""Frozen reference networks of a method, such as feature extractors for a loss and evaluators."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from datamodules.errors import UserError


@dataclass
class ReferenceNetwork:
    """A frozen network and its weights file.

    Args:
        network: network; it is set to evaluation mode, without gradients.
        find_weights: function that returns the weights file (.pth or .safetensors), or raises a UserError.
    """

    network: nn.Module
    find_weights: Callable[[], Path]
    weights_hash: str = ""  # sha256 of the file; empty until the file is loaded

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    def load(self) -> None:
        """Load the weights, once.

        Raises:
            UserError: the file is missing, damaged, or belongs to another network.
        """
        if self.weights_hash:
            return
        path = self.find_weights()
        try:
            is_safetensors = path.suffix == ".safetensors"
            state = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
            self.network.load_state_dict(state)
        except (OSError, EOFError, ValueError, TypeError, RuntimeError, UnpicklingError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as weights: {' '.join(str(error).split())}") from None
        with path.open("rb") as file:
            self.weights_hash = hashlib.file_digest(file, "sha256").hexdigest()
