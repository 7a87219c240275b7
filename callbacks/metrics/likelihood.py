"""Likelihoods: how many nats a picture costs a model with latents."""

import math
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError
from datamodules.random.noise import normal

CHUNK = 20  # draws of latents that are decoded together


class Likelihood(ImageMetric):
    """Bounds on log p(x), nats a picture, summed over its pixels: the mean over a set.

    Figures are named by the decoder's distribution and the datamodule's kind of pixels, `<kind>`: "bernoulli-dynamic",
    "bernoulli-static", "bernoulli-real-valued" (a cross-entropy, not a likelihood), "gaussian-real-valued" (a density of grey
    values as they are). Those of different kinds cannot be compared.

    - `elbo/<kind>`: Kingma and Welling, arXiv:1312.6114, eq. 3, one draw of latents a picture.
    - `reconstruction/<kind>` and `divergence/<kind>`: its two parts, elbo = -(reconstruction + divergence).
    - `nll-<k>/<kind>`, at tests: the importance-weighted bound of k draws, its sign turned; Burda et al., arXiv:1509.00519,
      eq. 8.
    - `active-units/<kind>`: latents next to the picture whose posterior mean varies by more than 0.01 over the set; the same,
      Section 5.2 (in its code over 500 training pictures).

    A picture's draws are a function of its number in its set. Expects outputs {"image", "code", "index"}.

    Args:
        n_samples: draws of latents at tests; 0 for none.
        seed: of these.
    """

    def __init__(self, n_samples: NonNegativeInt = 0, seed: int = 0) -> None:
        super().__init__()
        self.n_samples, self.seed = n_samples, seed
        self.batch: dict[str, np.ndarray] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what has no likelihood, before the first step."""
        if not hasattr(pl_module, "log_weights") or not hasattr(trainer.datamodule, "binarization"):
            raise UserError(
                f"Likelihood: {type(pl_module).__name__} on {type(trainer.datamodule).__name__} has none; "
                "it is for modules.vae.VAE on datamodules.reconstruction.Reconstruction"
            )

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure the pictures of a batch together."""
        found = likelihood_terms(pl_module, outputs, self.seed, self.n_samples if trainer.testing else 0)
        self.batch = {name: values.cpu().numpy() for name, values in found.items()}
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, np.ndarray]:
        """The picture's nats, and its latents' means."""
        return {name: values[i].copy() for name, values in self.batch.items()}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """See the class."""
        kind = f"{trainer.lightning_module.likelihood}-{trainer.datamodule.binarization}"
        of = {name: np.stack([one[name] for one in states]).astype(np.float64) for name in states[0]}
        codes = of.pop("code")
        found = {f"{name}/{kind}": float(values.mean()) for name, values in of.items()}
        return {**found, f"active-units/{kind}": float((codes.var(0) > 0.01).sum())}


def likelihood_terms(method: Any, outputs: dict[str, Any], seed: int, n_samples: int) -> dict[str, Tensor]:
    """The figures of each picture of a batch, (N,) each, and the means of its latents."""
    image, indices = outputs["image"], outputs["index"].tolist()

    def noise(stream: str, draws: int) -> Tensor:
        values = normal(seed, f"likelihood/{stream}", indices, draws * method.latent_size, np.float32)
        return torch.from_numpy(values).to(image).view(len(image), draws, -1).transpose(0, 1)

    reconstruction, divergence = method.elbo(image, noise("elbo", 1))
    found = {"elbo": -reconstruction - divergence, "reconstruction": reconstruction, "divergence": divergence}
    if n_samples:
        total = torch.full((len(image),), -math.inf, dtype=torch.float64, device=image.device)
        for first in range(0, n_samples, CHUNK):
            some = noise(str(first), CHUNK)[: n_samples - first]
            total = torch.logaddexp(total, method.log_weights(image, some).double().logsumexp(0))
        found[f"nll-{n_samples}"] = math.log(n_samples) - total
    return {**found, "code": outputs["code"].float()}
