"""DCGAN: deep convolutional generative adversarial networks.

A. Radford, L. Metz, S. Chintala. Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks.
ICLR 2016. arXiv:1511.06434.

Differences from the paper and the authors' code:

1. Kernels are 5 x 5 as in the paper, or 4 x 4 as in the authors' Torch version (dcgan.torch) and in most later code. With
   stride 2, a 4 x 4 kernel covers all interior pixels equally often, and a 5 x 5 kernel causes checkerboard artifacts.
2. Sampling uses the running statistics of batch normalization, so that a sample does not depend on its batch. The authors'
   code uses batch statistics.
3. Weight decay is not used, as in the paper; the authors' code for faces uses 1e-5.
4. Sizes from 28 to 128 pixels are supported. The number of blocks and the largest width change with the size.
5. Both networks are updated on every batch, the generator after the discriminator and on the same fakes, as in dcgan.torch.
   The authors' code for faces alternates between them from batch to batch.
6. Batch normalization after the projection is per channel; the authors' code normalizes each unit before reshaping.
"""

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.errors import UserError
from modules.losses.adversarial import bce_fake, bce_real
from modules.networks.build import NetworkSpec, build_network
from modules.networks.init import dcgan_init_
from modules.tasks.generation import GenerativeMethod
from modules.training.phases import Batch, Phase

BASE_RESOLUTION = {28: 7, 32: 4, 64: 4, 128: 4}  # image side -> side of the smallest feature maps


class DCGAN(GenerativeMethod):
    """DCGAN of Section 3: strided convolutions and batch normalization, without pooling and fully connected hidden layers.

    Args:
        channels: image channels, 1 or 3.
        size: image side in pixels: 28, 32, 64 or 128.
        kernel: kernel size, 5 (paper) or 4.
        base_channels: channels at half of the image size; they double at every downsampling. 128 in the paper (1024 at 4 x 4).
        latent_size: dimension of the latents.
        latent_distribution: "uniform" in (-1, 1), as in the paper, or "normal".
        total_images: training budget.
        learning_rate: Adam learning rate of both networks.
        beta1: Adam beta1, in [0, 1).
        generator: another generator, see `build_network`: latents (N, latent_size) to images (N, channels, size, size) in
            [-1, 1].
        discriminator: another discriminator: such images to logits (N, 1).
        seed: seed of the noise in training.

    Raises:
        UserError: `size` or `beta1` is not a valid value.
    """

    compiled_losses = ("discriminator_losses", "generator_losses")

    def __init__(
        self,
        channels: int = 3,
        size: Literal[28, 32, 64, 128] = 64,
        kernel: Literal[4, 5] = 5,
        base_channels: PositiveInt = 128,
        latent_size: PositiveInt = 100,
        latent_distribution: Literal["uniform", "normal"] = "uniform",
        total_images: int = 8_750_000,
        learning_rate: PositiveFloat = 2e-4,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.5,
        generator: NetworkSpec = None,
        discriminator: NetworkSpec = None,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_size, latent_distribution, total_images, learning_rate, seed)
        self.save_hyperparameters()
        self.constant_after_warmup = True
        if size not in BASE_RESOLUTION:
            raise UserError(f"model.size: {size} is not valid. Use one of {', '.join(map(str, BASE_RESOLUTION))}")
        if not 0 <= beta1 < 1:
            raise UserError(f"model.beta1: {beta1} is not valid. Use a value in [0, 1)")
        self.beta1 = beta1
        self.generator = build_network(
            "generator", generator, make_generator(latent_size, channels, size, kernel, base_channels)
        )
        self.discriminator = build_network(
            "discriminator", discriminator, make_discriminator(channels, size, kernel, base_channels)
        )
        for network in (self.generator, self.discriminator):
            dcgan_init_(network)  # Section 4
            network.to(memory_format=torch.channels_last)

    def forward(self, latents: Tensor) -> Tensor:
        """Generate images (N, channels, size, size) in [-1, 1], the range of the networks."""
        return self.generator(latents)

    def sample(self, latents: Tensor) -> Tensor:
        """Generate images (N, channels, size, size) in [0, 1] from latents (N, latent_size)."""
        return (self.generator(latents) + 1) / 2

    # Section 4: the same Adam settings for both networks

    def phases(self) -> list[Phase]:
        """Return the phases: D, then G."""
        return [
            Phase("discriminator", self.discriminator_losses),
            Phase("generator", self.generator_losses),
        ]

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Create one Adam optimizer for each network."""
        return {"discriminator": self.adam(self.discriminator), "generator": self.adam(self.generator)}

    def adam(self, network: nn.Module) -> torch.optim.Optimizer:
        """Create Adam with `beta1`; 0.5 instead of 0.9 "helped stabilize training" (Section 4)."""
        return torch.optim.Adam(network.parameters(), betas=(self.beta1, 0.999), fused=True)

    def shared_forward(self, batch: Batch) -> Batch:
        """Generate the fakes, which both phases use, because G is updated after D."""
        return {"fake": self.generator(self.batch_latents(batch))}

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses on reals and fakes, in separate passes because of batch normalization."""
        real = self.discriminator(batch["image"] * 2 - 1)
        fake = self.discriminator(batch["fake"].detach())
        return {"real": bce_real(real), "fake": bce_fake(fake)}

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the non-saturating loss (Goodfellow et al., arXiv:1406.2661, Section 3)."""
        return {"adversarial": bce_real(self.discriminator(batch["fake"]))}


def channels_per_level(size: int, base_channels: int) -> list[int]:
    """Return the channels at each level, from the smallest feature maps to half of the image size."""
    levels = int(math.log2(size // BASE_RESOLUTION[size]))
    return [base_channels * 2**level for level in reversed(range(levels))]


def make_generator(latent_size: int, channels: int, size: int, kernel: int, base_channels: int) -> nn.Sequential:
    """Create the generator of Figure 1: a projection, then fractionally strided convolutions.

    It maps latents (N, latent_size) to images (N, channels, size, size) in [-1, 1].
    """
    base_side, level_channels, padding = BASE_RESOLUTION[size], channels_per_level(size, base_channels), (kernel - 1) // 2
    layers: list[nn.Module] = [
        nn.Linear(latent_size, level_channels[0] * base_side**2, bias=False),
        nn.Unflatten(1, (level_channels[0], base_side, base_side)),
        nn.BatchNorm2d(level_channels[0]),
        nn.ReLU(),
    ]
    for in_channels, out_channels in pairwise(level_channels):
        layers += [nn.ConvTranspose2d(in_channels, out_channels, kernel, 2, padding, kernel % 2, bias=False)]
        layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
    layers.append(nn.ConvTranspose2d(level_channels[-1], channels, kernel, 2, padding, kernel % 2, bias=False))
    return nn.Sequential(*layers, nn.Tanh())


def make_discriminator(channels: int, size: int, kernel: int, base_channels: int) -> nn.Sequential:
    """Create the discriminator, a mirrored generator with LeakyReLU, without batch normalization in the first layer.

    It maps images (N, channels, size, size) in [-1, 1] to logits (N, 1).
    """
    base_side, level_channels, padding = BASE_RESOLUTION[size], channels_per_level(size, base_channels)[::-1], (kernel - 1) // 2
    layers: list[nn.Module] = [nn.Conv2d(channels, level_channels[0], kernel, 2, padding, bias=False), nn.LeakyReLU(0.2)]
    for in_channels, out_channels in pairwise(level_channels):
        layers += [
            nn.Conv2d(in_channels, out_channels, kernel, 2, padding, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(level_channels[-1] * base_side**2, 1, bias=False))
