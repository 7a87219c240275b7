"""Parzen window log-likelihood, by the protocol of Goodfellow's GAN."""

import math
from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import SampleSetMetric
from datamodules.errors import UserError
from datamodules.io.image_set import load_image_set

SIGMAS = torch.logspace(-1, 0, 10, dtype=torch.float64)


class ParzenLogLikelihood(SampleSetMetric):
    """Mean log-likelihood of the real test images, in nats, under a mixture of Gaussians centered on the samples.

    log p(x) = log mean_i exp(-|x - s_i|**2 / (2 sigma**2)) - D log(sigma sqrt(2 pi)), for D pixel values in [0, 1]. sigma is
    the best of ten values between 0.1 and 1 on the first 1000 held-out images of the datamodule. The protocol is that of
    goodfeli/adversarial (parzen_ll.py); the values in tables use 10,000 samples. The metric is logged as
    `parzen/<samples>-samples`, with the standard error as `.../error` and sigma as `.../sigma`. It is evaluated only at tests.

    The metric prefers smooth images to real ones. Two baselines demonstrate this: the same number of real images,
    or all if there are fewer (`parzen/<count>-images`), and as many k-means centroids (`parzen/<count>-centroids`).

    Args:
        reference_set: set of real images for the baselines; None to omit the baselines.
    """

    def __init__(self, reference_set: str | None = None) -> None:
        super().__init__()
        self.reference_set = reference_set

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Require a validation set, on which sigma is chosen.

        Raises:
            UserError: `data.val` is not set.
        """
        if trainer.datamodule.val is None:
            raise UserError("data.val: missing. Set it to held-out images, on which the sigma of the Parzen window is chosen")

    def update(self, images: Tensor) -> Tensor:
        """Return all pixels: float64 (N, D), not rounded, as in the original protocol."""
        return images.cpu().double().flatten(1)

    def compute(self, samples: Tensor, real: Tensor, trainer: Any) -> dict[str, float]:
        """Return the mean, its standard error over the real images, and sigma; the same for the baselines."""
        val_images, real = _flat(trainer.datamodule.val_images.pixels[:1000]), _flat(real)
        values = parzen_metrics(f"parzen/{len(samples)}-samples", samples, val_images, real)
        if self.reference_set is not None:
            data = trainer.datamodule
            images = _flat(
                load_image_set(self.reference_set, data.size, data.channels, data.crop_region, data.data_report).pixels
            )
            count = min(len(samples), len(images))
            values |= parzen_metrics(f"parzen/{count}-images", images[:count], val_images, real)
            values |= parzen_metrics(f"parzen/{count}-centroids", centroids(images, count), val_images, real)
        return values


def parzen_metrics(protocol: str, samples: Tensor, val_images: Tensor, real: Tensor) -> dict[str, float]:
    """Return the mean log-likelihood of the real images (N, D), its standard error over them, and sigma."""
    sigma = best_sigma(samples, val_images)
    per_image = log_likelihood(samples, real, sigma)
    error = per_image.std(correction=0) / len(real) ** 0.5
    return {protocol: per_image.mean().item(), f"{protocol}/error": error.item(), f"{protocol}/sigma": sigma}


def centroids(images: Tensor, count: int) -> Tensor:
    """Return `count` k-means centroids of images (N, D), after five rounds of Lloyd's algorithm from random images."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(count, init="random", n_init=1, max_iter=5, random_state=0).fit(images.float().numpy())
    return torch.from_numpy(kmeans.cluster_centers_).double()


def best_sigma(samples: Tensor, val_images: Tensor) -> float:
    """Return the value of `SIGMAS` with the highest mean log-likelihood of the held-out images (N, D)."""
    squares = torch.cdist(val_images, samples).square()
    means = torch.stack([_log_density(squares, sigma.item(), samples.shape[1]).mean() for sigma in SIGMAS])
    return SIGMAS[means.argmax()].item()


def log_likelihood(samples: Tensor, images: Tensor, sigma: float, batch_size: int = 1000) -> Tensor:
    """Return the log-likelihood of each image (N, D), in nats, under Gaussians around the samples (M, D): float64 (N,)."""
    parts = [_log_density(torch.cdist(chunk, samples).square(), sigma, samples.shape[1]) for chunk in images.split(batch_size)]
    return torch.cat(parts)


def _log_density(squares: Tensor, sigma: float, dimensions: int) -> Tensor:
    kernels = torch.logsumexp(-squares / (2 * sigma**2), dim=1) - math.log(squares.shape[1])
    return kernels - dimensions * math.log(sigma * math.sqrt(2 * math.pi))


def _flat(pixels: Tensor) -> Tensor:
    return pixels.double().flatten(1) / 255
