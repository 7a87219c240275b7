"""Base class of methods that generate images from random latents."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.batches import GenerationEvalBatch, GenerationOutputs
from datamodules.random.noise import normal, uniform
from datamodules.transforms.draw import PREVIEW_IMAGES, image_grid
from datamodules.transforms.to_device import to_device_async
from modules.training.method import Batch, Method


class GenerativeMethod(Method, ABC):
    """Method whose samples have indices: a sample depends only on its index and the seed, not on batches or ranks.

    Args:
        latent_dim: dimension of the latents.
        latent_distribution: "normal", with standard deviation 1, or "uniform", in (-1, 1).
        total_images, learning_rate, seed: see `Method`.
    """

    def __init__(
        self, latent_dim: int, latent_distribution: str, total_images: int, learning_rate: float, seed: int = 0
    ) -> None:
        super().__init__(total_images, learning_rate, seed=seed)
        self.latent_dim, self.latent_distribution = latent_dim, latent_distribution

    def sample_latents(self, indices: Sequence[int], seed: int = 0) -> Tensor:
        """Return the latents of the samples with these indices, (N, latent_dim)."""
        if self.latent_distribution == "normal":
            z = normal(seed, "sample", indices, self.latent_dim)
        else:
            z = 2 * uniform(seed, "sample", indices, self.latent_dim) - 1
        return to_device_async(torch.from_numpy(z).to(self.dtype), self.device)

    def batch_latents(self, batch: Batch) -> Tensor:
        """Return the latents of a training batch, (N, latent_dim), with the distribution of `sample_latents`."""
        z = self.batch_noise(batch, "latent", self.latent_dim, self.latent_distribution)
        return z if self.latent_distribution == "normal" else 2 * z - 1

    @abstractmethod
    def sample(self, latents: Tensor) -> Tensor:
        """Generate images (N, C, H, W) in [0, 1] from latents (N, latent_dim)."""

    def validation_step(self, batch: GenerationEvalBatch, batch_idx: int) -> GenerationOutputs:
        """Add the samples with the indices in "index" (N,) as "prediction"; callbacks compute the metrics."""
        return {**batch, "prediction": self.sample(self.sample_latents(batch["index"].tolist(), self.seed))}

    test_step = validation_step

    preview_limit = 1

    def preview(self, outputs: Batch) -> Tensor:
        """Draw a grid of samples; the latents are the same at each validation."""
        return image_grid(outputs["prediction"][:PREVIEW_IMAGES])
