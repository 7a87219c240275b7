"""Likelihood bounds of latent variable models."""

import math
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.protocols import LatentVariableModel, ReconstructionData
from datamodules.errors import UserError
from datamodules.random.noise import normal
from modules.losses.precision import full_precision

SAMPLES_PER_PASS = 20  # latent samples decoded per forward pass


class Likelihood(ImageMetric):
    """Bounds on log p(x) in nats per image, summed over pixels and averaged over a set.

    `<kind>` is the decoder's distribution and the datamodule's binarization: "bernoulli-dynamic", "bernoulli-static",
    "bernoulli-real-valued" (a cross-entropy, not a likelihood), "gaussian-real-valued" (a density of unquantized gray
    values). Values of different kinds are not comparable.

    - `elbo/<kind>`: Kingma and Welling, arXiv:1312.6114, eq. 3, with one latent sample per image.
    - `reconstruction/<kind>` and `divergence/<kind>`: its two terms, elbo = -(reconstruction + divergence).
    - `nll-<k>/<kind>`, at tests: the negative importance-weighted bound of k samples; Burda et al., arXiv:1509.00519, eq. 8.
    - `active-units/<kind>`: number of first-layer latents whose posterior mean has a variance above 0.01 over the set (Burda et
      al., Section 5.2; their code uses 500 training images).

    The latent samples of an image are a function of its index in its set. Required outputs: {"image", "code", "index"}.

    Args:
        n_samples: latent samples per image at tests, k of `nll-<k>`; 0 to omit this metric.
        seed: seed of the latent samples.
    """

    set_protocols = ("active-units",)
    required_outputs = ("image", "code", "index")

    def __init__(self, n_samples: NonNegativeInt = 0, seed: int = 0) -> None:
        super().__init__()
        self.n_samples, self.seed = n_samples, seed
        self.batch: dict[str, np.ndarray] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Require a model with a likelihood.

        Raises:
            UserError: the model is not a `LatentVariableModel`, or the datamodule is not `ReconstructionData`.
        """
        if not isinstance(pl_module, LatentVariableModel) or not isinstance(trainer.datamodule, ReconstructionData):
            raise UserError(
                f"Likelihood: {type(pl_module).__name__} on {type(trainer.datamodule).__name__} has no likelihood. "
                "Use modules.vae.VAE on datamodules.reconstruction.Reconstruction"
            )

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate the images of a batch together."""
        self._require_outputs(outputs, pl_module, batch_idx)
        with full_precision():
            terms = likelihood_terms(pl_module, outputs, self.seed, self.n_samples if trainer.testing else 0)
        self.batch = {name: values.cpu().numpy() for name, values in terms.items()}
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, np.ndarray]:
        """Return the likelihood terms and the posterior means of the image."""
        return {name: values[i].copy() for name, values in self.batch.items()}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        kind = f"{trainer.lightning_module.likelihood}-{trainer.datamodule.binarization}"
        stacked = {name: np.stack([state[name] for state in states]).astype(np.float64) for name in states[0]}
        codes = stacked.pop("code")
        terms = {f"{name}/{kind}": float(values.mean()) for name, values in stacked.items()}
        return {**terms, f"active-units/{kind}": float((codes.var(0) > 0.01).sum())}


def likelihood_terms(method: Any, outputs: dict[str, Any], seed: int, n_samples: int) -> dict[str, Tensor]:
    """Return the terms of each image of a batch, (N,) each, and the posterior means of the first-layer latents as "code"."""
    image, indices = outputs["image"], outputs["index"].tolist()

    def noise(stream: str, count: int) -> Tensor:
        values = normal(seed, f"likelihood/{stream}", indices, count * method.latent_dim, np.float32)
        return torch.from_numpy(values).to(image).view(len(image), count, -1).transpose(0, 1)

    reconstruction, divergence = method.elbo_terms(image, noise("elbo", 1))
    terms = {"elbo": -reconstruction - divergence, "reconstruction": reconstruction, "divergence": divergence}
    if n_samples:
        total = torch.full((len(image),), -math.inf, dtype=torch.float64, device=image.device)
        for start in range(0, n_samples, SAMPLES_PER_PASS):
            chunk = noise(str(start), SAMPLES_PER_PASS)[: n_samples - start]
            total = torch.logaddexp(total, method.log_weights(image, chunk).double().logsumexp(0))
        terms[f"nll-{n_samples}"] = math.log(n_samples) - total
    return {**terms, "code": outputs["code"].float()}
