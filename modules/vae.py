"""Variational auto-encoders, and their importance-weighted bound.

D. P. Kingma, M. Welling. Auto-Encoding Variational Bayes. ICLR 2014. arXiv:1312.6114 (AEVB).
Y. Burda, R. Grosse, R. Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016. arXiv:1509.00519 (IWAE).
I. Higgins et al. beta-VAE. ICLR 2017.

What we do differently, and why:

1. Weights begin as Glorot's (IWAE's code); AEVB's N(0, 0.01) learns more slowly and ends no better.
2. The last bias begins at zero, not at what gives the training set's mean (IWAE's code): a method does not know the data.
3. No prior on the weights (AEVB has N(0, I)): beside 60,000 pictures it is next to nothing.
4. The logarithm of a Gaussian's variance (AEVB, App. C.2) is at least -8 for pixels: a network that is sure of a pixel's 8 bits
   would make its density as large as it likes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.refused import Refused
from modules.adversarial import in_full
from modules.coders import Activation, Network, decoder, encoder, perceptron
from modules.generative import GenerativeMethod
from modules.method import Batch

Gaussian = tuple[Tensor, Tensor]  # means and logarithms of variances


class VAE(GenerativeMethod):
    """AEVB, Section 3, with one layer of latents or two (IWAE, Section 5).

    Args:
        channels: of a picture, 1 or 3.
        size: a picture's side in pixels.
        network: fully connected (both papers), or convolutional.
        hidden: units of the layers between a picture and its latents; see `modules.coders`.
        latent_size: latents next to the picture.
        above: a second layer of latents above these: units of the hidden layers between them, then how many latents it has
            (100-100-50 in IWAE's Section 5); none if empty.
        activation: of the hidden layers.
        likelihood: of a picture, given its latents: "bernoulli" or "gaussian".
        objective: "elbo" (AEVB, eq. 3), or "iwae" (IWAE, eq. 8).
        k: draws of latents a picture; the ELBO is their mean.
        beta: weight of the divergence in the ELBO; 1 in AEVB.
        optimizer: "adam" (IWAE), or "adagrad" (AEVB).
        legs: of the learning rate, IWAE's Section 5: leg i takes three times as long as the one before, at 10^(-i/7) of the
            highest rate; 8 in the paper. 0 for the same rate all the time.
        images: training budget.
        learning_rate: the highest.
        seed: of the noise in training.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 28,
        network: Network = "fully-connected",
        hidden: Sequence[int] = (500,),
        latent_size: int = 20,
        above: Sequence[int] = (),
        activation: Activation = "tanh",
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        objective: Literal["elbo", "iwae"] = "elbo",
        k: int = 1,
        beta: float = 1.0,
        optimizer: Literal["adam", "adagrad"] = "adam",
        legs: int = 0,
        images: int = 1_200_000,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_size + sum(above[-1:]), "normal", images, learning_rate, seed)
        self.save_hyperparameters()
        if k < 1:
            raise Refused(f"model.k: {k}; at least one draw of latents is needed")
        if beta != 1 and (objective == "iwae" or above):
            raise Refused(f"model.beta: {beta} is for the ELBO of one layer of latents; model.objective is {objective}")
        if len(above) == 1:
            raise Refused(f"model.above: {list(above)}; hidden units and then latents, as in [100, 100, 50]")
        self.likelihood, self.objective, self.k, self.beta = likelihood, objective, k, beta
        self.optimizer, self.legs = optimizer, legs
        self.sizes = [latent_size, *above[-1:]]  # of the layers of latents, from the picture upwards
        shape = (channels, size, size)
        told = (channels * (1 if likelihood == "bernoulli" else 2), size, size)
        self.encoder = encoder(network, shape, hidden, 2 * latent_size, activation)
        self.decoder = decoder(network, latent_size, hidden, told, activation)
        if above:
            *between, top = above
            self.upwards = perceptron((latent_size, *between, 2 * top), activation)
            self.downwards = perceptron((top, *reversed(between), 2 * latent_size), activation)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(layer.weight)
        for name, values in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(values)

    def forward(self, image: Tensor) -> Tensor:
        """What comes back of a picture's most probable latents: (N, C, H, W) in [0, 1] to the same."""
        return self.means(self.decoder(self.posterior(image)[0]))

    def sample(self, latents: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [0, 1] from standard normal numbers, from the top layer downwards."""
        if len(self.sizes) == 1:
            return self.means(self.decoder(latents))
        lower, top = latents.split(self.sizes, dim=1)
        return self.means(self.decoder(drawn(self.gaussian(self.downwards, top), lower)))

    def means(self, told: Tensor) -> Tensor:
        """The expected picture, from what the decoder says; a Gaussian's means are in (0, 1) as well (AEVB, App. C.2)."""
        return in_full(told[:, : self.hparams["channels"]]).sigmoid()

    # AEVB, Sections 2.2 and 2.3; for two layers IWAE, eq. 5 to 8

    def gaussian(self, network: nn.Module, inputs: Tensor) -> Gaussian:
        """App. C.2: means and logarithms of variances, (N, latents) each, in full precision."""
        mean, log_variance = in_full(network(inputs)).chunk(2, dim=1)
        return mean, log_variance

    def posterior(self, image: Tensor) -> Gaussian:
        """q(z|x) of the latents next to the picture."""
        return self.gaussian(self.encoder, image)

    def log_likelihood(self, image: Tensor, latents: Tensor) -> Tensor:
        """Log p(x|z), summed over pixels: pictures (N, C, H, W) and latents (k, N, latents) to (k, N), in nats."""
        told = in_full(self.decoder(latents.flatten(0, 1)))
        if self.likelihood == "bernoulli":
            # log p = x t - log(1 + e^t), t what the decoder tells
            told = told.unflatten(0, latents.shape[:2]).flatten(2)
            return torch.einsum("nd,knd->kn", image.flatten(1), told) - F.softplus(told).sum(2)
        mean, log_variance = told.chunk(2, dim=1)
        image = image.expand(len(latents), *image.shape).flatten(0, 1)
        return log_normal(image, (mean.sigmoid(), log_variance.clamp(min=-8))).view(latents.shape[:2])

    def draw(self, posterior: Gaussian, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents next to the picture (k, N, latents), and log p(z) - log q(z|x) of all latents, (k, N)."""
        lower, *upper = noise.split(self.sizes, dim=2)
        latents = drawn(posterior, lower)
        if not upper:
            return latents, log_normal(latents) - log_normal(latents, posterior)
        flat = latents.flatten(0, 1)
        above = self.gaussian(self.upwards, flat)
        top = drawn(above, upper[0].flatten(0, 1))
        prior = log_normal(flat, self.gaussian(self.downwards, top)) + log_normal(top)
        return latents, (prior - log_normal(top, above)).view(latents.shape[:2]) - log_normal(latents, posterior)

    def log_weights(self, image: Tensor, noise: Tensor) -> Tensor:
        """Log p(x, z) - log q(z|x) (IWAE, eq. 7), (k, N), in nats.

        Args:
            image: (N, C, H, W) in [0, 1].
            noise: standard normal, (k, N, all latents), of which the latents are made.
        """
        latents, ratio = self.draw(self.posterior(image), noise)
        return self.log_likelihood(image, latents) + ratio

    def elbo(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The bound's two parts, AEVB, eq. 3: -E log p(x|z) and the divergence, (N,) each, in nats a picture.

        The divergence of one layer of latents is in closed form (App. B), that of two is estimated by the same draws. Arguments
        as of `log_weights`.
        """
        posterior = self.posterior(image)
        if len(self.sizes) == 1:
            return -self.log_likelihood(image, drawn(posterior, noise)).mean(0), divergence(posterior)
        latents, ratio = self.draw(posterior, noise)
        return -self.log_likelihood(image, latents).mean(0), -ratio.mean(0)

    # Training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Nats a picture: the bound's negative, as reconstruction and divergence where the latter has a closed form."""
        image, each = batch["image"], self.k * self.latent_size
        noise = self.noise(batch, "latent", each).view(len(image), self.k, -1).transpose(0, 1)
        if self.objective == "iwae":
            return {"bound": -importance_bound(self.log_weights(image, noise)).mean()}
        reconstruction, divergence = self.elbo(image, noise)
        return {"reconstruction": reconstruction.mean(), "divergence": self.beta * divergence.mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AEVB, Section 5: Adagrad; IWAE, Section 5: Adam with an epsilon of 1e-4."""
        if self.optimizer == "adagrad":
            return torch.optim.Adagrad(self.parameters(), fused=True)
        return torch.optim.Adam(self.parameters(), eps=1e-4 if self.legs else 1e-8, fused=True)

    def schedule(self, images_seen: int) -> float:
        """IWAE, Section 5: 3^i passes at 10^(-i/7) of the rate, for i = 0, 1, ...; or the same rate all the time."""
        if not self.legs:
            return self.learning_rate
        passes = images_seen / self.images * (3**self.legs - 1) / 2  # leg i begins after (3^i - 1) / 2
        leg = min(self.legs - 1, int(math.log(2 * passes + 1, 3) + 1e-9))
        return self.learning_rate * 10 ** (-leg / 7)

    # To be measured

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """What comes back of pictures, and their latents; what the bound is, `callbacks.likelihood` says."""
        image = batch["image"].to(self.dtype)
        return {**batch, "prediction": self(image), "code": self.posterior(image)[0]}

    test_step = validation_step


def drawn(of: Gaussian, noise: Tensor) -> Tensor:
    """AEVB, Section 2.4: latents from standard normal noise."""
    mean, log_variance = of
    return mean + (log_variance / 2).exp() * noise


def log_normal(values: Tensor, of: Gaussian | None = None) -> Tensor:
    """Log density of a Gaussian, by default the standard one, summed over all but the leading dimensions it is told of.

    Latents (..., n) are summed over n; pictures (N, C, H, W) over all but N.
    """
    mean, log_variance = of or (values.new_zeros(()), values.new_zeros(()))
    nats = -0.5 * ((values - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))
    return nats.flatten(1).sum(1) if nats.ndim == 4 else nats.sum(-1)


def divergence(of: Gaussian) -> Tensor:
    """AEVB, App. B: KL(q || N(0, I)), in nats: (N, latents) to (N,)."""
    mean, log_variance = of
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)


def importance_bound(log_weights: Tensor) -> Tensor:
    """IWAE, eq. 8: log of the mean weight, (k, N) to (N,)."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
