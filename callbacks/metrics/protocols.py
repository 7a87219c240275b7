"""Interfaces of methods and datamodules that metrics and callbacks require in addition to outputs."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from datamodules.io.image_set import ImageSet


@runtime_checkable
class LatentVariableModel(Protocol):
    """A method with a likelihood, see `modules.vae.VAE`."""

    likelihood: str
    latent_dim: int

    def elbo_terms(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the two terms of the negative bound, (N,) each, in nats."""

    def log_weights(self, image: Tensor, noise: Tensor) -> Tensor:
        """Compute the log importance weights (k, N), in nats."""


@runtime_checkable
class HasEncoder(Protocol):
    """A method whose outputs have codes."""

    encoder: Any


@runtime_checkable
class HasOutputBias(Protocol):
    """A method whose decoder has an output bias."""

    def init_output_bias(self, mean: Tensor) -> None:
        """Set the bias so that the decoder outputs this image (C, H, W)."""


@runtime_checkable
class ReconstructionData(Protocol):
    """A datamodule of images to reconstruct, see `datamodules.reconstruction.Reconstruction`."""

    binarization: str
    exclude_classes: Sequence[str]
    image_hw: tuple[int, ...] | None
    reference_sets: dict[str, ImageSet]

    def is_unseen(self, labels: Tensor) -> Tensor:
        """Return whether each label (N,) is absent from training: bool (N,)."""
