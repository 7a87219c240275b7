"""Variational auto-encoders, and their importance-weighted bound.

D. P. Kingma, M. Welling. Auto-Encoding Variational Bayes. ICLR 2014. arXiv:1312.6114 (AEVB).
Y. Burda, R. Grosse, R. Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016. arXiv:1509.00519 (IWAE).
I. Higgins et al. beta-VAE. ICLR 2017.

What we do differently, and why:

1. Weights begin as Glorot's (IWAE's code); AEVB's N(0, 0.01) is untried.
2. The last bias begins at zero (AEVB says nothing of it); with `InitOutputBias` at the mean of training pictures (IWAE's
   code).
3. No prior on the weights; AEVB has N(0, I), untried.
4. The logarithm of a Gaussian's variance (AEVB, App. C.2) is above -8 for pixels, by a soft floor: a network that is sure of a
   pixel's 8 bits would make its density as large as it likes.
5. Adam is that of IWAE's text. In its code beta1 is 0.99, second moments begin at one (a warm-up), gradients are summed over a
   batch; five passes with beta1 and the sum showed no gain.
6. One layer's divergence is in closed form; IWAE's code draws it, so that its VAE is its bound of k = 1 (here: objective
   "iwae", k 1). Its encoder tells the logarithm of a deviation where ours tells that of a variance (AEVB, App. C.2).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.errors import Refused
from modules.losses.precision import to_float32
from modules.networks.init import xavier_init_
from modules.networks.mlp_conv import Activation, Network, decoder, encoder, perceptron, sides
from modules.tasks.generation import GenerativeMethod
from modules.training.method import Batch

Gaussian = tuple[Tensor, Tensor]  # means and logarithms of variances


class VAE(GenerativeMethod):
    """AEVB, Section 3, with one layer of latents or two (IWAE, Section 5).

    Args:
        channels: of a picture, 1 or 3.
        size: a picture's side in pixels, or its height and width.
        network: fully connected (both papers), or convolutional.
        hidden: units of the layers between a picture and its latents; see `modules.networks.mlp_conv`.
        latent_size: latents next to the picture.
        above: a second layer of latents above these: units of the hidden layers between them, then how many latents it has
            (100-100-50 in IWAE's Section 5); none if empty.
        activation: of the hidden layers.
        likelihood: of a picture, given its latents: "bernoulli" or "gaussian".
        objective: "elbo" (AEVB, eq. 3), or "iwae" (IWAE, eq. 8).
        k: draws of latents a picture; the ELBO is their mean.
        beta: weight of the divergence in the ELBO; 1 in AEVB.
        optimizer: "adam" (IWAE), or "adagrad" (AEVB).
        epsilon: of Adam; 1e-4 in IWAE.
        first_leg: images of the learning rate's first leg, IWAE's Section 5: each leg takes three times as long as the one
            before, at 10^(-1/7) of its rate; one pass in the paper, which goes eight legs. 0 for the same rate all the time.
        images: training budget.
        learning_rate: the highest.
        seed: of the noise in training.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int | Sequence[int] = 28,
        network: Network = "fully-connected",
        hidden: Sequence[PositiveInt] = (500,),
        latent_size: PositiveInt = 20,
        above: Sequence[PositiveInt] = (),
        activation: Activation = "tanh",
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        objective: Literal["elbo", "iwae"] = "elbo",
        k: int = 1,
        beta: NonNegativeFloat = 1.0,
        optimizer: Literal["adam", "adagrad"] = "adam",
        epsilon: PositiveFloat = 1e-8,
        first_leg: NonNegativeInt = 0,
        images: int = 1_200_000,
        learning_rate: PositiveFloat = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_size + sum(above[-1:]), "normal", images, learning_rate, seed)
        self.save_hyperparameters()
        if k < 1:
            raise Refused(f"model.k: {k}; at least one draw of latents is needed")
        if beta != 1 and objective == "iwae":
            raise Refused(f"model.beta: {beta} weighs a part of the ELBO; the model.objective iwae has no parts")
        if beta != 1 and above:
            raise Refused(f"model.beta: {beta} is for one layer of latents; model.above makes two")
        if len(above) == 1:
            raise Refused(f"model.above: {list(above)}; hidden units and then latents, as in [100, 100, 50]")
        self.likelihood, self.objective, self.k, self.beta = likelihood, objective, k, beta
        self.optimizer, self.epsilon, self.first_leg = optimizer, epsilon, first_leg
        self.sizes = [latent_size, *above[-1:]]  # of the layers of latents, from the picture upwards
        shape = (channels, *sides(size))
        told = (channels * (1 if likelihood == "bernoulli" else 2), *sides(size))
        self.encoder = encoder(network, shape, hidden, 2 * latent_size, activation)
        self.decoder = decoder(network, latent_size, hidden, told, activation)
        if above:
            *between, top = above
            self.upwards = perceptron((latent_size, *between, 2 * top), activation)
            self.downwards = perceptron((top, *reversed(between), 2 * latent_size), activation)
        xavier_init_(self)

    def forward(self, image: Tensor) -> Tensor:
        """What comes back of a picture's most probable latents: (N, C, H, W) in [0, 1] to the same."""
        return self.decoded(self.posterior(image)[0])

    def sample(self, latents: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [0, 1] from standard normal numbers, from the top layer downwards."""
        if len(self.sizes) == 1:
            return self.decoded(latents)
        lower, top = latents.split(self.sizes, dim=1)
        return self.decoded(drawn(self.gaussian(self.downwards, top), lower))

    def decoded(self, latents: Tensor) -> Tensor:
        """The expected picture of latents next to it; a Gaussian's means are in (0, 1) as well (AEVB, Frey's faces)."""
        made = self.decoder(latents.to(self.dtype))
        return to_float32(made[:, : self.hparams["channels"]]).sigmoid()

    def begin_with(self, mean: Tensor) -> None:
        """Set the last bias so that the decoder begins with a picture (C, H, W) in [0, 1], as in IWAE's code."""
        last = [layer for layer in self.decoder.modules() if isinstance(layer, nn.Linear | nn.ConvTranspose2d)][-1]
        mean = mean.clamp(0.001, 0.999)
        if isinstance(last, nn.ConvTranspose2d):  # a bias is a channel's, not a pixel's
            mean = mean.mean((1, 2))
        with torch.no_grad():
            assert last.bias is not None
            last.bias[: mean.numel()] = mean.logit().flatten()

    # AEVB, Sections 2.2 and 2.3; for two layers IWAE, eq. 5 to 8

    def gaussian(self, network: nn.Module, inputs: Tensor) -> Gaussian:
        """App. C.2: means and logarithms of variances, (N, latents) each, in full precision."""
        mean, log_variance = to_float32(network(inputs.to(self.dtype))).chunk(2, dim=1)
        return mean, log_variance

    def posterior(self, image: Tensor) -> Gaussian:
        """q(z|x) of the latents next to the picture."""
        return self.gaussian(self.encoder, image)

    def log_likelihood(self, image: Tensor, latents: Tensor) -> Tensor:
        """The sum of log p(x|z) over pixels: pictures (N, C, H, W) and latents (k, N, latents) to (k, N), in nats.

        A Gaussian's is the logarithm of a density of grey values as they are, which can be above zero.
        """
        made = to_float32(self.decoder(latents.flatten(0, 1).to(self.dtype))).unflatten(
            0, latents.shape[:2]
        )  # (k, N, C', H, W)
        if self.likelihood == "bernoulli":
            costs = F.binary_cross_entropy_with_logits(made, image.expand_as(made), reduction="none")
            return -costs.flatten(2).sum(2)
        mean, log_variance = made.chunk(2, dim=2)
        return log_gaussian(image, (mean.sigmoid(), F.softplus(log_variance + 8) - 8)).flatten(2).sum(2)

    def proposal(self, posterior: Gaussian, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents next to the picture (k, N, latents), and log p(z) - log q(z|x) of all latents, (k, N)."""
        lower, *upper = noise.split(self.sizes, dim=2)
        latents = drawn(posterior, lower)
        proposed = log_gaussian(lower).sum(2) - posterior[1].sum(1) / 2  # log q(z|x), by the noise that z is made of
        if not upper:
            return latents, log_gaussian(latents).sum(2) - proposed
        above = self.gaussian(self.upwards, latents.flatten(0, 1))
        top = drawn(above, upper[0].flatten(0, 1))
        beneath = self.gaussian(self.downwards, top)
        prior = log_gaussian(latents.flatten(0, 1), beneath).sum(1) + log_gaussian(top).sum(1)
        proposed_above = log_gaussian(upper[0].flatten(0, 1)).sum(1) - above[1].sum(1) / 2
        return latents, (prior - proposed_above).view(latents.shape[:2]) - proposed

    def log_weights(self, image: Tensor, noise: Tensor) -> Tensor:
        """The log p(x, z) - log q(z|x) of IWAE, eq. 7: (k, N), in nats.

        The networks' rounding to bf16 moves them by nats: train and measure them in fp32.

        Args:
            image: (N, C, H, W) in [0, 1].
            noise: standard normal, (k, N, all latents), of which the latents are made.
        """
        latents, ratio = self.proposal(self.posterior(image), noise)
        return self.log_likelihood(image, latents) + ratio

    def elbo(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The bound's two parts, AEVB, eq. 3: -E log p(x|z) and the divergence, (N,) each, in nats a picture.

        The divergence of one layer of latents is in closed form (App. B), that of two is estimated by the same draws. Arguments
        as of `log_weights`.
        """
        posterior = self.posterior(image)
        if len(self.sizes) == 1:
            return -self.log_likelihood(image, drawn(posterior, noise)).mean(0), divergence(posterior)
        latents, ratio = self.proposal(posterior, noise)
        return -self.log_likelihood(image, latents).mean(0), -ratio.mean(0)

    # Training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Nats a picture: the bound's negative, as reconstruction and divergence where the latter has a closed form."""
        image, each = batch["image"], self.k * self.latent_size
        noise = self.noise(batch, "latent", each, "fast-normal").view(len(image), self.k, -1).transpose(0, 1)
        if self.objective == "iwae":
            return {"bound": -importance_bound(self.log_weights(image, noise)).mean()}
        reconstruction, kl = self.elbo(image, noise)
        name = "divergence" if self.beta == 1 else "weighted_divergence"
        return {"reconstruction": reconstruction.mean(), name: self.beta * kl.mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AEVB, Section 5: Adagrad; IWAE, Section 5: Adam."""
        if self.optimizer == "adagrad":
            return torch.optim.Adagrad(self.parameters(), fused=True)
        return torch.optim.Adam(self.parameters(), eps=self.epsilon, fused=True)

    def schedule(self, images_seen: int) -> float:
        """IWAE, Section 5: 3^i passes at 10^(-i/7) of the rate, for i = 0, 1, ...; or the same rate all the time."""
        if not self.first_leg:
            return self.learning_rate
        leg, begin = 0, self.first_leg  # begin: of the next leg
        while images_seen >= begin:
            leg, begin = leg + 1, 3 * begin + self.first_leg
        return self.learning_rate * 10 ** (-leg / 7)

    # To be measured

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """What comes back of pictures, and their latents; samples, where there are numbers instead of pictures.

        What the bound is, `callbacks.metrics.likelihood` says.
        """
        if "image" not in batch:
            return super().validation_step(batch, batch_idx)
        code, _ = self.posterior(batch["image"])
        return {**batch, "prediction": self.decoded(code), "code": code}

    test_step = validation_step


def drawn(of: Gaussian, noise: Tensor) -> Tensor:
    """AEVB, Section 2.4: latents from standard normal noise."""
    mean, log_variance = of
    return mean + (log_variance / 2).exp() * noise


def log_gaussian(values: Tensor, of: Gaussian | None = None) -> Tensor:
    """Log density of each value by itself under a Gaussian, by default the standard one."""
    if of is None:
        return -0.5 * (values.square() + math.log(2 * math.pi))
    mean, log_variance = of
    return -0.5 * ((values - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))


def divergence(of: Gaussian) -> Tensor:
    """AEVB, App. B: KL(q || N(0, I)), in nats: (N, latents) to (N,)."""
    mean, log_variance = of
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)


def importance_bound(log_weights: Tensor) -> Tensor:
    """IWAE, eq. 8: log of the mean weight, (k, N) to (N,)."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
