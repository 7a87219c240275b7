"""What the methods share that make images from noise: numbered latents, and their samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.random.noise import normal, uniform
from modules.training.method import Batch, Method


class GenerativeMethod(Method, ABC):
    """A method whose samples are numbered: sample 17 is the same picture however the work is split.

    Args:
        latent_size: numbers that a sample is made from.
        latent_distribution: how they are distributed: "normal" with deviation 1, or "uniform" in (-1, 1).
        total_images, learning_rate, seed: see `Method`.
    """

    def __init__(
        self, latent_size: int, latent_distribution: str, total_images: int, learning_rate: float, seed: int = 0
    ) -> None:
        super().__init__(total_images, learning_rate, seed=seed)
        self.latent_size, self.latent_distribution = latent_size, latent_distribution

    def sample_latents(self, indices: Sequence[int], seed: int = 0) -> Tensor:
        """The latents of the samples of these numbers: (N, latent_size)."""
        if self.latent_distribution == "normal":
            z = normal(seed, "sample", indices, self.latent_size)
        else:
            z = 2 * uniform(seed, "sample", indices, self.latent_size) - 1
        return torch.from_numpy(z).to(self.dtype).to(self.device)

    def batch_latents(self, batch: Batch) -> Tensor:
        """Latents of a training step, distributed as those of `sample_latents`: (N, latent_size)."""
        z = self.batch_noise(batch, "latent", self.latent_size, self.latent_distribution)
        return z if self.latent_distribution == "normal" else 2 * z - 1

    @abstractmethod
    def sample(self, latents: Tensor) -> Tensor:
        """The images made from latents (N, latent_size): (N, C, H, W) in [0, 1]."""

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The samples of the numbers in "index" (N,); what they are worth, callbacks say."""
        return {**batch, "prediction": self.sample(self.sample_latents(batch["index"].tolist(), self.seed))}

    test_step = validation_step
