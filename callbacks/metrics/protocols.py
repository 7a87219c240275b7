"""What metrics and callbacks need of methods and datamodules, beyond outputs."""

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
        """The two terms of the negative bound, (N,) each."""

    def log_weights(self, image: Tensor, noise: Tensor) -> Tensor:
        """Importance weights (k, N)."""


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
        """Whether each label (N,) is absent from training."""
