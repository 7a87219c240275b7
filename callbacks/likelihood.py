"""Likelihoods: how many nats a picture costs a model with latents."""

import math
from typing import Any

import torch
from torch import Tensor

from callbacks.per_picture import PerPicture
from datamodules.noise import normal

AT_ONCE = 25_000  # latents that are decoded together


class Likelihood(PerPicture):
    """Bounds on log p(x), nats a picture, summed over its pixels: the mean over a set. `<pixels>` is the datamodule's kind.

    - `elbo/<pixels>`: Kingma and Welling, arXiv:1312.6114, eq. 3, one draw of latents a picture.
    - `reconstruction/<pixels>` and `divergence/<pixels>`: what it falls short of zero by, in its two parts.
    - `nll-<k>/<pixels>`, at tests: the importance-weighted bound of k draws, its sign turned; Burda et al., arXiv:1509.00519,
      eq. 8.
    - `active-units/<pixels>`: latents whose posterior mean varies by more than 0.01 over the set; the same, Section 5.2.

    A picture's draws are a function of its place in its set. Expects outputs {"image", "code", "index"}.

    Args:
        k: draws of latents at tests; 0 for none.
        seed: of these.
    """

    def __init__(self, k: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.k, self.seed = k, seed

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure the pictures of a batch together."""
        self.measured = measured(pl_module, outputs, self.seed, self.k if trainer.state.fn == "test" or trainer.testing else 0)
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    def keep(self, outputs: dict[str, Any], i: int) -> dict[str, Any]:
        """The picture's nats, and its latents' means."""
        return {name: values[i].cpu() for name, values in self.measured.items()}

    def put_together(self, kept: list[Any], trainer: Any) -> dict[str, float]:
        """See the class."""
        pixels = trainer.datamodule.pixels
        of = {name: torch.stack([one[name] for one in kept]).double() for name in kept[0]}
        codes = of.pop("code")
        found = {f"{name}/{pixels}": values.mean().item() for name, values in of.items()}
        return {**found, f"active-units/{pixels}": float((codes.var(0, correction=0) > 0.01).sum())}


def measured(method: Any, outputs: dict[str, Any], seed: int, k: int) -> dict[str, Tensor]:
    """The figures of each picture of a batch, (N,) each, and the means of its latents."""
    image, numbers = outputs["image"], outputs["index"].tolist()

    def noise(draw: int, count: int) -> Tensor:
        values = normal(seed, f"likelihood/{draw}", numbers, count * method.latent_size)
        return torch.from_numpy(values).to(image).view(len(image), count, -1).transpose(0, 1)

    reconstruction, divergence = method.elbo(image, noise(0, 1))
    found = {"elbo": -(reconstruction + divergence), "reconstruction": reconstruction, "divergence": divergence}
    if k:
        count = max(1, AT_ONCE // len(image))
        total = torch.full((len(image),), -math.inf, dtype=torch.float64, device=image.device)
        for first in range(0, k, count):
            weights = method.log_weights(image, noise(1 + first, min(count, k - first))).double()
            total = torch.logaddexp(total, weights.logsumexp(0))
        found[f"nll-{k}"] = math.log(k) - total
    return {**found, "code": outputs["code"]}
