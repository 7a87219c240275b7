"""Frozen reference networks of a method, such as feature extractors for a loss and evaluators."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from datamodules.errors import UserError
from datamodules.io.paths import file_hash
from modules.networks.weights import read_weights_file
from modules.training.lightning_compat import FastSetattrModule


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


class ModuleWithReferences(FastSetattrModule):
    """LightningModule with frozen reference networks, which are not trained and not part of checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.references: dict[str, ReferenceNetwork] = {}

    def add_reference(self, name: str, network: nn.Module, find_weights: Callable[[], Path]) -> None:
        """Register a frozen network that losses use as `self.references[name].network`, such as VGG.

        The network is moved to the method's device. It is not trained and not part of checkpoints; the run record contains the
        hash of its weights. The weights are loaded before the first step.

        Args:
            name: name in the record.
            network: network; its weights are replaced by those of the file.
            find_weights: function that returns the weights file, or raises a UserError.
        """
        self.references[name] = ReferenceNetwork(network, find_weights)

    def file_hashes(self) -> dict[str, str]:
        """Return the sha256 of the files that training depends on, by name; empty if a file is not loaded yet."""
        return {name: reference.weights_hash for name, reference in self.references.items()}

    def setup(self, stage: str) -> None:
        """Load the weights of the reference networks before training; an override must call this method.

        Raises:
            UserError: the weights are missing, damaged, or belong to another network.
        """
        if stage == "fit":
            for reference in self.references.values():
                reference.load()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Apply a device or dtype conversion to the method and to its reference networks."""
        for reference in self.__dict__.get("references", {}).values():
            reference.network._apply(fn, recurse)
        return super()._apply(fn, recurse)
