"""Frozen reference networks of a method, such as feature extractors for a loss and evaluators."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from datamodules.errors import UserError
from datamodules.io.paths import file_hash
from modules.networks.weights import read_weights_file


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
            self.network.load_state_dict(read_weights_file(path))
        except (RuntimeError, TypeError) as error:
            network = type(self.network).__name__
            raise UserError(
                f"{path} does not contain the weights of {network}: {str(error).splitlines()[-1].strip()}"
            ) from None
        self.weights_hash = file_hash(path)
