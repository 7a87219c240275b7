"""Generative adversarial nets.

I. Goodfellow, J. Pouget-Abadie, M. Mirza, B. Xu, D. Warde-Farley, S. Ozair, A. Courville, Y. Bengio. Generative Adversarial
Nets. NIPS 2014. arXiv:1406.2661. The paper does not specify the networks and the training for MNIST. They are those of the
paper's code, goodfeli/adversarial (mnist.yaml).

Differences from the paper and its code:

1. The networks are updated in turn, as in Algorithm 1, but on the same fakes; Algorithm 1 samples new ones. The paper's code
   computes both gradients before it updates a network.
2. The generator's last bias is initialized to zero instead of the training mean, because a method has no access to the data.
3. The learning rate and the momentum are functions of the images seen instead of batches and epochs. The curves are the same.
4. Each rank has its own dropout masks, so runs with several ranks differ from a run with one.
"""

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.errors import UserError
from modules.losses.adversarial import bce_fake, bce_real, gan_generator_loss
from modules.tasks.generation import GenerativeMethod
from modules.training.optimizers import kernels
from modules.training.phases import Batch, Phase


class GAN(GenerativeMethod):
    """GAN of Section 3, on flattened images; the paper's code uses batches of 100.

    Args:
        channels: image channels, 1 or 3.
        size: image side in pixels.
        loss: generator loss: "non-saturating", max log D(G(z)), or "saturating", min log(1 - D(G(z))) (eq. 1).
        latent_size: dimension of the latents.
        hidden_dim: units of each hidden layer of the generator; the discriminator has a fifth as many maxout units, each with
            five pieces.
        discriminator_steps: discriminator updates per generator update (k in Algorithm 1).
        total_images: training budget.
        learning_rate: initial learning rate.
        seed: seed of the noise in training.

    Raises:
        UserError: `discriminator_steps` is less than 1.
    """

    compiled_losses = ("discriminator_losses", "generator_losses")

    def __init__(
        self,
        channels: int = 1,
        size: int = 28,
        loss: Literal["non-saturating", "saturating"] = "non-saturating",
        latent_size: PositiveInt = 100,
        hidden_dim: PositiveInt = 1200,
        discriminator_steps: PositiveInt = 1,
        total_images: int = 12_500_000,
        learning_rate: PositiveFloat = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_size, "normal", total_images, learning_rate, seed)
        self.save_hyperparameters()
        if discriminator_steps < 1:
            raise UserError(f"model.discriminator_steps: {discriminator_steps} is too small. Use at least 1")
        self.loss, self.discriminator_steps = loss, discriminator_steps
        pixels = channels * size**2
        self.generator = nn.Sequential(
            nn.Linear(latent_size, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, pixels),
            nn.Sigmoid(),
            nn.Unflatten(1, (channels, size, size)),
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.2),
            Maxout(pixels, hidden_dim // 5),
            nn.Dropout(0.5),
            Maxout(hidden_dim // 5, hidden_dim // 5),
            nn.Dropout(0.5),
            nn.Linear(hidden_dim // 5, 1),
        )
        for network, init_bound in ((self.generator, 0.05), (self.discriminator, 0.005)):
            for layer in network.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.uniform_(layer.weight, -init_bound, init_bound)
                    nn.init.zeros_(layer.bias)

    def sample(self, latents: Tensor) -> Tensor:
        """Generate images (N, channels, size, size) in [0, 1]."""
        return self.generator(latents)

    def forward(self, latents: Tensor) -> Tensor:
        """See `sample`."""
        return self.sample(latents)

    # Algorithm 1

    def phases(self) -> list[Phase]:
        """Return the phases: D on every batch, and G on every k-th batch."""
        return [
            Phase("discriminator", self.discriminator_losses, self.sgd_schedule),
            Phase("generator", self.generator_losses, self.sgd_schedule, every_n_steps=self.discriminator_steps),
        ]

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Create one SGD optimizer for each network."""
        return {
            "discriminator": torch.optim.SGD(self.discriminator.parameters(), **kernels(self.device)),
            "generator": torch.optim.SGD(self.generator.parameters(), **kernels(self.device)),
        }

    def shared_forward(self, batch: Batch) -> Batch:
        """Generate the fakes, which both phases use, because G is updated after D."""
        return {"fake": self.generator(self.batch_latents(batch))}

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute eq. 1, halved as in the paper's code."""
        real, fake = self.discriminator(batch["image"]), self.discriminator(batch["fake"].detach())
        return {"real": bce_real(real) / 2, "fake": bce_fake(fake) / 2}

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the saturating or non-saturating loss of Section 3."""
        return {"adversarial": gan_generator_loss(self.discriminator(batch["fake"]), self.loss)}

    def sgd_schedule(self, images_seen: int) -> dict[str, float]:
        """Return the learning rate and the momentum of the paper's code.

        The learning rate is divided by 1.000004 per batch of 100 images, down to 1e-6. The momentum increases from 0.5 to 0.7
        in 250 epochs of 50,000 images.
        """
        lr = max(1e-6, self.learning_rate * 1.000004 ** (-images_seen / 100))
        return {"lr": lr, "momentum": 0.5 + 0.2 * min(1.0, images_seen / 12_500_000)}


class Maxout(nn.Module):
    """Maximum of five affine maps per unit: (N, features) to (N, units). arXiv:1302.4389, Section 2."""

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 5 * units)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer; the pieces of a unit are adjacent in `linear`."""
        return self.linear(inputs).unflatten(1, (-1, 5)).amax(2)
