"""Variational autoencoders and importance-weighted autoencoders.

D. P. Kingma, M. Welling. Auto-Encoding Variational Bayes. ICLR 2014. arXiv:1312.6114 (AEVB).
Y. Burda, R. Grosse, R. Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016. arXiv:1509.00519 (IWAE).
I. Higgins et al. beta-VAE. ICLR 2017.

Differences from the papers and their code:

1. Weights have Glorot initialization, as in IWAE's code; AEVB's N(0, 0.01) was not tried.
2. The last bias is initialized to zero. With `InitOutputBias`, the decoder initially outputs the mean training image, as in
   IWAE's code. AEVB specifies no such initialization.
3. There is no prior on the weights; AEVB's N(0, I) was not tried.
4. The log variance of Gaussian pixels (AEVB, App. C.2) has a soft lower bound of -8. Without the bound, the density of 8-bit
   pixels that are predicted exactly would be unbounded.
5. Adam has the settings of IWAE's text. In IWAE's code, beta1 is 0.99, second moments start at one (a warm-up), and gradients
   are summed over a batch. Five epochs with this beta1 and with summed gradients gave no improvement.
6. The KL divergence of a single latent layer is computed in closed form. IWAE's code estimates it from samples, so its VAE
   corresponds to objective "iwae" with `n_samples` 1. IWAE's encoder outputs log sigma; this one outputs log sigma^2 (AEVB,
   App. C.2).
"""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.batches import GenerationEvalBatch, GenerationOutputs, ReconstructionEvalBatch, ReconstructionOutputs
from datamodules.errors import UserError
from datamodules.transforms.draw import PREVIEW_IMAGES, stack_rows
from modules.losses.precision import to_float32
from modules.networks.init import xavier_init_
from modules.networks.mlp_conv import Activation, NetworkType, decoder, encoder, mlp, to_hw
from modules.tasks.generation import GenerativeMethod
from modules.training.fsdp import gather_full_tensors, local_shard
from modules.training.method import Batch
from modules.training.stages import Stage

Gaussian = tuple[Tensor, Tensor]  # mean and log variance


class VAE(GenerativeMethod):
    """VAE (AEVB, Section 3) with one or two layers of latents (IWAE, Section 5).

    Args:
        channels: image channels, 1 or 3.
        size: image side in pixels, or height and width.
        network: "fully-connected", as in both papers, or "convolutional".
        hidden_dims: units of the encoder's hidden layers; see `modules.networks.mlp_conv`.
        latent_size: dimension of the first latent layer, which is adjacent to the image.
        top_dims: hidden sizes of the second latent layer, followed by its dimension ([100, 100, 50] in IWAE, Section 5); empty
            for a single latent layer.
        activation: activation of the hidden layers.
        likelihood: p(x|z): "bernoulli" or "gaussian".
        objective: "elbo" (AEVB, eq. 3), or "iwae" (IWAE, eq. 8).
        n_samples: latent samples per image, k in IWAE; the ELBO is averaged over them.
        beta: weight of the KL divergence in the ELBO; 1 in AEVB.
        optimizer: "adam" (IWAE), or "adagrad" (AEVB).
        eps: epsilon of Adam; 1e-4 in IWAE.
        first_stage_images: length of the first learning-rate stage in images (IWAE, Section 5); 0 for a constant rate. Each
            stage is three times as long as the previous one and has 10^(-1/7) times its rate. The paper has eight stages; the
            first has one epoch.
        total_images: training budget.
        learning_rate: initial learning rate.
        seed: seed of the noise in training.

    Raises:
        UserError: `n_samples` is less than 1, `top_dims` has no hidden sizes, or `beta` is not 1 for objective "iwae" or two
            latent layers; also see `modules.networks.mlp_conv.encoder`.
    """

    compiled_losses = ("losses",)

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
        eps: PositiveFloat = 1e-8,
        first_stage_images: NonNegativeInt = 0,
        total_images: int = 1_200_000,
        learning_rate: PositiveFloat = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_size + sum(top_dims[-1:]), "normal", total_images, learning_rate, seed)
        self.save_hyperparameters()
        if n_samples < 1:
            raise UserError(f"model.n_samples: {n_samples} is too small. Use at least 1")
        if beta != 1 and objective == "iwae":
            raise UserError(f"model.beta: {beta} requires model.objective elbo. Use 1, or change the objective")
        if beta != 1 and top_dims:
            raise UserError(f"model.beta: {beta} requires one latent layer. Use 1, or remove model.top_dims")
        if len(top_dims) == 1:
            raise UserError(
                f"model.top_dims: {list(top_dims)} has no hidden sizes. List them before the dimension, as in [100, 100, 50]"
            )
        self.likelihood, self.objective, self.n_samples, self.beta = likelihood, objective, n_samples, beta
        self.optimizer, self.eps, self.first_stage_images = optimizer, eps, first_stage_images
        self.latent_sizes = [latent_size, *top_dims[-1:]]  # one per latent layer; the first is adjacent to the image
        shape = (channels, *to_hw(size))
        output_shape = (channels * (1 if likelihood == "bernoulli" else 2), *to_hw(size))
        self.encoder = encoder(network, shape, hidden_dims, 2 * latent_size, activation)
        self.decoder = decoder(network, latent_size, hidden_dims, output_shape, activation)
        if top_dims:
            *top_hidden, top = top_dims
            self.top_encoder = mlp((latent_size, *top_hidden, 2 * top), activation)
            self.top_decoder = mlp((top, *reversed(top_hidden), 2 * latent_size), activation)
        xavier_init_(self)

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct images (N, C, H, W) in [0, 1] from the posterior means."""
        return self.decode(self.posterior(image)[0])

    def sample(self, latents: Tensor) -> Tensor:
        """Generate images (N, C, H, W) in [0, 1] from standard normal latents (N, latent_dim), by ancestral sampling."""
        if len(self.latent_sizes) == 1:
            return self.decode(latents)
        lower, top = latents.split(self.latent_sizes, dim=1)
        return self.decode(reparameterize(self.gaussian_params(self.top_decoder, top), lower))

    def decode(self, latents: Tensor) -> Tensor:
        """Compute the mean of p(x|z), (N, C, H, W) in (0, 1), from first-layer latents (N, latent_size).

        Means of Gaussian pixels are in (0, 1) too (AEVB, Frey Faces).
        """
        logits = self.decoder(latents.to(self.dtype))
        return to_float32(logits[:, : self.hparams["channels"]]).sigmoid()

    def init_output_bias(self, mean: Tensor) -> None:
        """Set the last bias so that the decoder initially outputs an image (C, H, W) in [0, 1], as in IWAE's code.

        A convolutional decoder has one bias per channel, which is set from the mean of the channel.
        """
        last_layer = [layer for layer in self.decoder.modules() if isinstance(layer, nn.Linear | nn.ConvTranspose2d)][-1]
        mean = mean.clamp(0.001, 0.999)
        if isinstance(last_layer, nn.ConvTranspose2d):  # one bias per channel
            mean = mean.mean((1, 2))
        with torch.no_grad():
            assert last_layer.bias is not None
            bias = gather_full_tensors(last_layer.bias).clone()  # with fsdp2, each process has a part
            bias[: mean.numel()] = mean.logit().flatten()
            last_layer.bias.copy_(local_shard(bias, last_layer.bias))

    # AEVB, Sections 2.2 and 2.3; for two layers IWAE, eq. 5 to 8

    def gaussian_params(self, network: nn.Module, inputs: Tensor) -> Gaussian:
        """Compute means and log variances (AEVB, App. C.2), (N, latents) each, in float32."""
        mean, log_variance = to_float32(network(inputs.to(self.dtype))).chunk(2, dim=1)
        return mean, log_variance

    def posterior(self, image: Tensor) -> Gaussian:
        """Compute the parameters of q(z|x), (N, latent_size) each, for the first-layer latents of images (N, C, H, W)."""
        return self.gaussian_params(self.encoder, image)

    def log_likelihood(self, image: Tensor, latents: Tensor) -> Tensor:
        """Compute log p(x|z) in nats, summed over pixels: images (N, C, H, W) and latents (k, N, latent_size) to (k, N).

        For Gaussian pixels, it is a log density of values in [0, 1], which can be positive.
        """
        logits = to_float32(self.decoder(latents.flatten(0, 1).to(self.dtype))).unflatten(
            0, latents.shape[:2]
        )  # (k, N, C', H, W)
        if self.likelihood == "bernoulli":
            cross_entropy = F.binary_cross_entropy_with_logits(logits, image.expand_as(logits), reduction="none")
            return -cross_entropy.flatten(2).sum(2)
        mean, log_variance = logits.chunk(2, dim=2)
        return gaussian_log_prob(image, (mean.sigmoid(), F.softplus(log_variance + 8) - 8)).flatten(2).sum(2)

    def sample_posterior(self, posterior: Gaussian, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Sample first-layer latents (k, N, latent_size), and compute log p(z) - log q(z|x) of all latents, (k, N)."""
        lower, *upper = noise.split(self.latent_sizes, dim=2)
        latents = reparameterize(posterior, lower)
        log_q = gaussian_log_prob(lower).sum(2) - posterior[1].sum(1) / 2  # log q(z|x) in terms of the noise
        if not upper:
            return latents, gaussian_log_prob(latents).sum(2) - log_q
        top_posterior = self.gaussian_params(self.top_encoder, latents.flatten(0, 1))
        top = reparameterize(top_posterior, upper[0].flatten(0, 1))
        latent_prior = self.gaussian_params(self.top_decoder, top)
        prior = gaussian_log_prob(latents.flatten(0, 1), latent_prior).sum(1) + gaussian_log_prob(top).sum(1)
        log_q_top = gaussian_log_prob(upper[0].flatten(0, 1)).sum(1) - top_posterior[1].sum(1) / 2
        return latents, (prior - log_q_top).view(latents.shape[:2]) - log_q

    def log_weights(self, image: Tensor, noise: Tensor) -> Tensor:
        """Compute the log importance weights log p(x, z) - log q(z|x) (IWAE, eq. 7): (k, N), in nats.

        Rounding to bf16 causes errors on the order of one nat. Train and evaluate in fp32.

        Args:
            image: (N, C, H, W) in [0, 1].
            noise: standard normal noise (k, N, latent_dim).
        """
        latents, log_p_minus_log_q = self.sample_posterior(self.posterior(image), noise)
        return self.log_likelihood(image, latents) + log_p_minus_log_q

    def elbo_terms(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both terms of the negative ELBO (AEVB, eq. 3): -E log p(x|z) and the KL divergence, (N,) each, in nats.

        With one latent layer, the KL divergence is in closed form (AEVB, App. B). With two layers, it is estimated from the
        same samples. See `log_weights` for the arguments.
        """
        posterior = self.posterior(image)
        if len(self.latent_sizes) == 1:
            return -self.log_likelihood(image, reparameterize(posterior, noise)).mean(0), kl_standard_normal(posterior)
        latents, log_p_minus_log_q = self.sample_posterior(posterior, noise)
        return -self.log_likelihood(image, latents).mean(0), -log_p_minus_log_q.mean(0)

    # Training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the negative bound in nats per image, with one term for IWAE and two for the ELBO.

        The terms are "bound" for IWAE, and "reconstruction" and "divergence" for the ELBO. With `beta` other than 1, the second
        is "weighted_divergence".
        """
        image, noise_dim = batch["image"], self.n_samples * self.latent_dim
        noise = self.batch_noise(batch, "latent", noise_dim, "fast-normal").view(len(image), self.n_samples, -1).transpose(0, 1)
        if self.objective == "iwae":
            return {"bound": -iwae_bound(self.log_weights(image, noise)).mean()}
        reconstruction, kl = self.elbo_terms(image, noise)
        name = "divergence" if self.beta == 1 else "weighted_divergence"
        return {"reconstruction": reconstruction.mean(), name: self.beta * kl.mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create Adagrad (AEVB, Section 5) or Adam (IWAE, Section 5)."""
        if self.optimizer == "adagrad":
            return torch.optim.Adagrad(self.parameters(), fused=self.device.type == "cpu")  # torch 2.9 has no kernel for CUDA
        return torch.optim.Adam(self.parameters(), eps=self.eps, fused=True)

    def stages(self) -> list[Stage]:
        """Return the stages; stage i = 0, 1, ... has 3^i times as many images as the first (IWAE, Section 5)."""
        stages = [Stage()]
        while self.first_stage_images and (start := 3 * stages[-1].start + self.first_stage_images) < self.total_images:
            stages.append(Stage(start))
        return stages

    def schedule(self, images_seen: int) -> float:
        """Return the learning rate: `learning_rate` times 10^(-i/7) in stage i = 0, 1, ... (IWAE, Section 5), or constant."""
        if not self.first_stage_images:
            return self.learning_rate
        stage, stage_end = 0, self.first_stage_images
        while images_seen >= stage_end:
            stage, stage_end = stage + 1, 3 * stage_end + self.first_stage_images
        return self.learning_rate * 10 ** (-stage / 7)

    # Evaluation

    def validation_step(
        self, batch: GenerationEvalBatch | ReconstructionEvalBatch, batch_idx: int
    ) -> GenerationOutputs | ReconstructionOutputs:
        """Add reconstructions as "prediction" and posterior means as "code"; for a batch without images, add samples.

        `callbacks.metrics.likelihood` computes the bounds.
        """
        if "image" not in batch:
            return super().validation_step(batch, batch_idx)
        images = cast(ReconstructionEvalBatch, batch)
        code, _ = self.posterior(images["image"])
        return {**images, "prediction": self.decode(code), "code": code}

    test_step = validation_step

    def preview(self, outputs: Batch) -> Tensor:
        """Draw images above their reconstructions, or samples."""
        if "image" not in outputs:
            return super().preview(outputs)
        return stack_rows(*(outputs[name][: PREVIEW_IMAGES // 4] for name in ("image", "prediction")))


def reparameterize(params: Gaussian, noise: Tensor) -> Tensor:
    """Transform standard normal noise (..., latents) to latents of the same shape (AEVB, Section 2.4)."""
    mean, log_variance = params
    return mean + (log_variance / 2).exp() * noise


def gaussian_log_prob(values: Tensor, params: Gaussian | None = None) -> Tensor:
    """Compute the elementwise log density under a Gaussian, by default the standard normal."""
    if params is None:
        return -0.5 * (values.square() + math.log(2 * math.pi))
    mean, log_variance = params
    return -0.5 * ((values - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))


def kl_standard_normal(params: Gaussian) -> Tensor:
    """Compute KL(q || N(0, I)) in nats (AEVB, App. B): (N, latents) to (N,)."""
    mean, log_variance = params
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)


def iwae_bound(log_weights: Tensor) -> Tensor:
    """Compute the log of the mean importance weight (IWAE, eq. 8): (k, N) to (N,), in nats."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
