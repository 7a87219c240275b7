"""Log-likelihood by a Parzen window, the protocol of Goodfellow's GAN."""

import math
from typing import Any

import torch
from torch import Tensor

from callbacks.generated import GeneratedImages

SIGMAS = torch.logspace(-1, 0, 10, dtype=torch.float64)


class Parzen(GeneratedImages):
    """Mean log-likelihood of the real test images, in nats, under Gaussians around the samples.

    log p(x) = log mean_i exp(-|x - s_i|**2 / (2 sigma**2)) - D log(sigma sqrt(2 pi)), pixels in [0, 1]; sigma is the best of
    ten between 0.1 and 1 on the first 1000 held-out images of the datamodule. As goodfeli/adversarial (parzen_ll.py); table
    figures have 10,000 samples. In tests alone. The measure prefers smooth samples, even k-means centroids, to real images.
    """

    def keep(self, images: Tensor) -> Tensor:
        """All pixels: float64 (N, D); not rounded, as the samples of that protocol are not."""
        return images.cpu().double().flatten(1)

    def measure(self, made: Tensor, real: Tensor, trainer: Any) -> dict[str, float]:
        """The mean, its standard error over the real images, and sigma."""
        held_out = _flat(trainer.datamodule.held_out.pixels[:1000])
        sigma = best_sigma(made, held_out)
        likelihood = log_likelihood(made, _flat(real), sigma)
        protocol = f"{len(made)}-samples"
        return {
            f"parzen/{protocol}": likelihood.mean().item(),
            f"parzen-error/{protocol}": (likelihood.std(correction=0) / len(real) ** 0.5).item(),
            f"parzen-sigma/{protocol}": sigma,
        }


def best_sigma(samples: Tensor, held_out: Tensor) -> float:
    """Of ten values, the one under which the held-out images (N, D) are the most likely."""
    squares = torch.cdist(held_out, samples).square()
    means = torch.stack([_from_squares(squares, sigma.item(), samples.shape[1]).mean() for sigma in SIGMAS])
    return SIGMAS[means.argmax()].item()


def log_likelihood(samples: Tensor, images: Tensor, sigma: float, at_once: int = 1000) -> Tensor:
    """Of each image (N, D), in nats, under Gaussians of that width around the samples (M, D): float64 (N,)."""
    parts = [_from_squares(torch.cdist(part, samples).square(), sigma, samples.shape[1]) for part in images.split(at_once)]
    return torch.cat(parts)


def _from_squares(squares: Tensor, sigma: float, dimensions: int) -> Tensor:
    kernels = torch.logsumexp(-squares / (2 * sigma**2), dim=1) - math.log(squares.shape[1])
    return kernels - dimensions * math.log(sigma * math.sqrt(2 * math.pi))


def _flat(pixels: Tensor) -> Tensor:
    return pixels.double().flatten(1) / 255
