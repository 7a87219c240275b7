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

from datamodules.errors import UserError
from modules.losses.precision import to_float32
from modules.networks.init import xavier_init_
from modules.networks.mlp_conv import Activation, NetworkType, decoder, encoder, mlp, to_hw
from modules.tasks.generation import GenerativeMethod
from modules.training.method import Batch

Gaussian = tuple[Tensor, Tensor]  # means and logarithms of variances


class VAE(GenerativeMethod):
    """AEVB, Section 3, with one layer of latents or two (IWAE, Section 5).

    Args:
        channels: of a picture, 1 or 3.
        size: a picture's side in pixels, or its height and width.
        network: fully connected (both papers), or convolutional.
        hidden_dims: units of the layers between a picture and its latents; see `modules.networks.mlp_conv`.
        latent_size: latents next to the picture.
        top_dims: a second layer of latents above these: units of the hidden layers between them, then how many latents it has
            (100-100-50 in IWAE's Section 5); none if empty.
        activation: of the hidden layers.
        likelihood: of a picture, given its latents: "bernoulli" or "gaussian".
        objective: "elbo" (AEVB, eq. 3), or "iwae" (IWAE, eq. 8).
        n_samples: draws of latents a picture; the ELBO is their mean.
        beta: weight of the divergence in the ELBO; 1 in AEVB.
        optimizer: "adam" (IWAE), or "adagrad" (AEVB).
        epsilon: of Adam; 1e-4 in IWAE.
        first_stage_images: images of the learning rate's first leg, IWAE's Section 5: each leg takes three times as long as the one
            before, at 10^(-1/7) of its rate; one pass in the paper, which goes eight legs. 0 for the same rate all the time.
        total_images: training budget.
        learning_rate: the highest.
        seed: of the noise in training.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int | Sequence[int] = 28,
        network: NetworkType = "fully-connected",
        hidden_dims: Sequence[PositiveInt] = (500,),
        latent_size: PositiveInt = 20,
        top_dims: Sequence[PositiveInt] = (),
        activation: Activation = "tanh",
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        objective: Literal["elbo", "iwae"] = "elbo",
        n_samples: int = 1,
        beta: NonNegativeFloat = 1.0,
        optimizer: Literal["adam", "adagrad"] = "adam",
        epsilon: PositiveFloat = 1e-8,
        first_stage_images: NonNegativeInt = 0,
        total_images: int = 1_200_000,
        learning_rate: PositiveFloat = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_size + sum(top_dims[-1:]), "normal", total_images, learning_rate, seed)
        self.save_hyperparameters()
        if n_samples < 1:
            raise UserError(f"model.n_samples: {n_samples}; at least one draw of latents is needed")
        if beta != 1 and objective == "iwae":
            raise UserError(f"model.beta: {beta} weighs a part of the ELBO; the model.objective iwae has no parts")
        if beta != 1 and top_dims:
            raise UserError(f"model.beta: {beta} is for one layer of latents; model.top_dims makes two")
        if len(top_dims) == 1:
            raise UserError(f"model.top_dims: {list(top_dims)}; hidden units and then latents, as in [100, 100, 50]")
        self.likelihood, self.objective, self.n_samples, self.beta = likelihood, objective, n_samples, beta
        self.optimizer, self.epsilon, self.first_stage_images = optimizer, epsilon, first_stage_images
        self.latent_sizes = [latent_size, *top_dims[-1:]]  # of the layers of latents, from the picture upwards
        shape = (channels, *to_hw(size))
        output_shape = (channels * (1 if likelihood == "bernoulli" else 2), *to_hw(size))
        self.encoder = encoder(network, shape, hidden_dims, 2 * latent_size, activation)
        self.decoder = decoder(network, latent_size, hidden_dims, output_shape, activation)
        if top_dims:
            *between, top = top_dims
            self.top_encoder = mlp((latent_size, *between, 2 * top), activation)
            self.top_decoder = mlp((top, *reversed(between), 2 * latent_size), activation)
        xavier_init_(self)

    def forward(self, image: Tensor) -> Tensor:
        """What comes back of a picture's most probable latents: (N, C, H, W) in [0, 1] to the same."""
        return self.decode(self.posterior(image)[0])

    def sample(self, latents: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [0, 1] from standard normal numbers, from the top layer downwards."""
        if len(self.latent_sizes) == 1:
            return self.decode(latents)
        lower, top = latents.split(self.latent_sizes, dim=1)
        return self.decode(reparameterize(self.gaussian_params(self.top_decoder, top), lower))

    def decode(self, latents: Tensor) -> Tensor:
        """The expected picture of latents next to it; a Gaussian's means are in (0, 1) as well (AEVB, Frey's faces)."""
        logits = self.decoder(latents.to(self.dtype))
        return to_float32(logits[:, : self.hparams["channels"]]).sigmoid()

    def init_output_bias(self, mean: Tensor) -> None:
        """Set the last bias so that the decoder begins with a picture (C, H, W) in [0, 1], as in IWAE's code."""
        last_layer = [layer for layer in self.decoder.modules() if isinstance(layer, nn.Linear | nn.ConvTranspose2d)][-1]
        mean = mean.clamp(0.001, 0.999)
        if isinstance(last_layer, nn.ConvTranspose2d):  # a bias is a channel's, not a pixel's
            mean = mean.mean((1, 2))
        with torch.no_grad():
            assert last_layer.bias is not None
            last_layer.bias[: mean.numel()] = mean.logit().flatten()

    # AEVB, Sections 2.2 and 2.3; for two layers IWAE, eq. 5 to 8

    def gaussian_params(self, network: nn.Module, inputs: Tensor) -> Gaussian:
        """App. C.2: means and logarithms of variances, (N, latents) each, in full precision."""
        mean, log_variance = to_float32(network(inputs.to(self.dtype))).chunk(2, dim=1)
        return mean, log_variance

    def posterior(self, image: Tensor) -> Gaussian:
        """q(z|x) of the latents next to the picture."""
        return self.gaussian_params(self.encoder, image)

    def log_likelihood(self, image: Tensor, latents: Tensor) -> Tensor:
        """The sum of log p(x|z) over pixels: pictures (N, C, H, W) and latents (k, N, latents) to (k, N), in nats.

        A Gaussian's is the logarithm of a density of grey values as they are, which can be above zero.
        """
        logits = to_float32(self.decoder(latents.flatten(0, 1).to(self.dtype))).unflatten(
            0, latents.shape[:2]
        )  # (k, N, C', H, W)
        if self.likelihood == "bernoulli":
            costs = F.binary_cross_entropy_with_logits(logits, image.expand_as(logits), reduction="none")
            return -costs.flatten(2).sum(2)
        mean, log_variance = logits.chunk(2, dim=2)
        return gaussian_log_prob(image, (mean.sigmoid(), F.softplus(log_variance + 8) - 8)).flatten(2).sum(2)

    def sample_posterior(self, posterior: Gaussian, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents next to the picture (k, N, latents), and log p(z) - log q(z|x) of all latents, (k, N)."""
        lower, *upper = noise.split(self.latent_sizes, dim=2)
        latents = reparameterize(posterior, lower)
        log_q = gaussian_log_prob(lower).sum(2) - posterior[1].sum(1) / 2  # log q(z|x), by the noise that z is made of
        if not upper:
            return latents, gaussian_log_prob(latents).sum(2) - log_q
        top_posterior = self.gaussian_params(self.top_encoder, latents.flatten(0, 1))
        top = reparameterize(top_posterior, upper[0].flatten(0, 1))
        beneath = self.gaussian_params(self.top_decoder, top)
        prior = gaussian_log_prob(latents.flatten(0, 1), beneath).sum(1) + gaussian_log_prob(top).sum(1)
        log_q_top = gaussian_log_prob(upper[0].flatten(0, 1)).sum(1) - top_posterior[1].sum(1) / 2
        return latents, (prior - log_q_top).view(latents.shape[:2]) - log_q

    def log_weights(self, image: Tensor, noise: Tensor) -> Tensor:
        """The log p(x, z) - log q(z|x) of IWAE, eq. 7: (k, N), in nats.

        The networks' rounding to bf16 moves them by nats: train and measure them in fp32.

        Args:
            image: (N, C, H, W) in [0, 1].
            noise: standard normal, (k, N, all latents), of which the latents are made.
        """
        latents, log_p_minus_log_q = self.sample_posterior(self.posterior(image), noise)
        return self.log_likelihood(image, latents) + log_p_minus_log_q

    def elbo(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The bound's two parts, AEVB, eq. 3: -E log p(x|z) and the divergence, (N,) each, in nats a picture.

        The divergence of one layer of latents is in closed form (App. B), that of two is estimated by the same draws. Arguments
        as of `log_weights`.
        """
        posterior = self.posterior(image)
        if len(self.latent_sizes) == 1:
            return -self.log_likelihood(image, reparameterize(posterior, noise)).mean(0), kl_standard_normal(posterior)
        latents, log_p_minus_log_q = self.sample_posterior(posterior, noise)
        return -self.log_likelihood(image, latents).mean(0), -log_p_minus_log_q.mean(0)

    # Training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Nats a picture: the bound's negative, as reconstruction and divergence where the latter has a closed form."""
        image, noise_dim = batch["image"], self.n_samples * self.latent_size
        noise = self.batch_noise(batch, "latent", noise_dim, "fast-normal").view(len(image), self.n_samples, -1).transpose(0, 1)
        if self.objective == "iwae":
            return {"bound": -iwae_bound(self.log_weights(image, noise)).mean()}
        reconstruction, kl = self.elbo(image, noise)
        name = "divergence" if self.beta == 1 else "weighted_divergence"
        return {"reconstruction": reconstruction.mean(), name: self.beta * kl.mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AEVB, Section 5: Adagrad; IWAE, Section 5: Adam."""
        if self.optimizer == "adagrad":
            return torch.optim.Adagrad(self.parameters(), fused=True)
        return torch.optim.Adam(self.parameters(), eps=self.epsilon, fused=True)

    def stage_starts(self) -> list[int]:
        """IWAE, Section 5: stage i takes 3^i times as many images as the first."""
        starts = [0]
        while self.first_stage_images and starts[-1] < self.total_images:
            starts.append(3 * starts[-1] + self.first_stage_images)
        return starts[:-1] if len(starts) > 1 else starts

    def schedule(self, images_seen: int) -> float:
        """IWAE, Section 5: 10^(-i/7) of the rate in stage i = 0, 1, ...; or the same rate all the time."""
        if not self.first_stage_images:
            return self.learning_rate
        stage, stage_end = 0, self.first_stage_images
        while images_seen >= stage_end:
            stage, stage_end = stage + 1, 3 * stage_end + self.first_stage_images
        return self.learning_rate * 10 ** (-stage / 7)

    # To be measured

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """What comes back of pictures, and their latents; samples, where there are numbers instead of pictures.

        What the bound is, `callbacks.metrics.likelihood` says.
        """
        if "image" not in batch:
            return super().validation_step(batch, batch_idx)
        code, _ = self.posterior(batch["image"])
        return {**batch, "prediction": self.decode(code), "code": code}

    test_step = validation_step


def reparameterize(params: Gaussian, noise: Tensor) -> Tensor:
    """AEVB, Section 2.4: latents from standard normal noise."""
    mean, log_variance = params
    return mean + (log_variance / 2).exp() * noise


def gaussian_log_prob(values: Tensor, params: Gaussian | None = None) -> Tensor:
    """Log density of each value by itself under a Gaussian, by default the standard one."""
    if params is None:
        return -0.5 * (values.square() + math.log(2 * math.pi))
    mean, log_variance = params
    return -0.5 * ((values - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))


def kl_standard_normal(params: Gaussian) -> Tensor:
    """AEVB, App. B: KL(q || N(0, I)), in nats: (N, latents) to (N,)."""
    mean, log_variance = params
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)


def iwae_bound(log_weights: Tensor) -> Tensor:
    """IWAE, eq. 8: log of the mean weight, (k, N) to (N,)."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
