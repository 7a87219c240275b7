"""Generative adversarial nets.

I. Goodfellow, J. Pouget-Abadie, M. Mirza, B. Xu, D. Warde-Farley, S. Ozair, A. Courville, Y. Bengio. Generative Adversarial
Nets. NIPS 2014. arXiv:1406.2661. The networks and the training on MNIST are not in the paper but in its code,
goodfeli/adversarial (mnist.yaml), from which they are taken.

What we do differently, and why:

1. The players move in turn, as Algorithm 1 has it, and on the same fakes, for which Algorithm 1 draws anew; the code
   differentiates both losses at the same weights.
2. The generator's last bias begins at zero, not at what gives the training set's mean: a method does not know the data.
3. The learning rate and the momentum are functions of the images seen, not of batches and epochs: the same curves.
4. Each process drops units of its own choice; with several, that is another (equally distributed) run.
"""

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.errors import Refused
from modules.losses.adversarial import called_fake, called_real, generator_loss
from modules.tasks.generation import GenerativeMethod
from modules.training.phases import Batch, Phase


class GAN(GenerativeMethod):
    """Section 3 on flat images, batches of 100 in the paper's code.

    Args:
        channels: of an image, 1 or 3.
        size: an image's side in pixels.
        loss: of the generator: "non-saturating", max log D(G(z)), or "saturating", min log(1 - D(G(z))) (eq. 1).
        latent_size: numbers that an image is made from.
        width: units of each of the generator's hidden layers; of the discriminator's, a fifth as many with five pieces each.
        discriminator_steps: batches that the discriminator sees for each one that the generator sees (k in Algorithm 1).
        images: training budget.
        learning_rate: at the start.
        seed: of the noise in training.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 28,
        loss: Literal["non-saturating", "saturating"] = "non-saturating",
        latent_size: PositiveInt = 100,
        width: PositiveInt = 1200,
        discriminator_steps: PositiveInt = 1,
        images: int = 12_500_000,
        learning_rate: PositiveFloat = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_size, "normal", images, learning_rate, seed)
        self.save_hyperparameters()
        if discriminator_steps < 1:
            raise Refused(f"model.discriminator_steps: {discriminator_steps}; the discriminator needs 1 at least")
        self.loss, self.discriminator_steps = loss, discriminator_steps
        pixels = channels * size**2
        self.generator = nn.Sequential(
            nn.Linear(latent_size, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, pixels),
            nn.Sigmoid(),
            nn.Unflatten(1, (channels, size, size)),
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.2),
            Maxout(pixels, width // 5),
            nn.Dropout(0.5),
            Maxout(width // 5, width // 5),
            nn.Dropout(0.5),
            nn.Linear(width // 5, 1),
        )
        for network, reach in ((self.generator, 0.05), (self.discriminator, 0.005)):
            for layer in network.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.uniform_(layer.weight, -reach, reach)
                    nn.init.zeros_(layer.bias)

    def sample(self, latents: Tensor) -> Tensor:
        """Images (N, channels, size, size) in [0, 1]."""
        return self.generator(latents)

    def forward(self, latents: Tensor) -> Tensor:
        """See `sample`."""
        return self.sample(latents)

    # Algorithm 1

    def phases(self) -> list[Phase]:
        """For k batches one step of D each, then one of G."""
        return [
            Phase("discriminator", [self.discriminator], torch.optim.SGD, self.discriminator_losses, self.descent),
            Phase(
                "generator",
                [self.generator],
                torch.optim.SGD,
                self.generator_losses,
                self.descent,
                every=self.discriminator_steps,
            ),
        ]

    def shared(self, batch: Batch) -> Batch:
        """The fakes: G stands still while D moves, so that the same ones serve both."""
        return {"fake": self.generator(self.training_latents(batch))}

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 1, of which the code takes half."""
        real, fake = self.discriminator(batch["image"]), self.discriminator(batch["fake"].detach())
        return {"real": called_real(real) / 2, "fake": called_fake(fake) / 2}

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Section 3: one of its two."""
        return {"adversarial": generator_loss(self.discriminator(batch["fake"]), self.loss)}

    def descent(self, images_seen: int) -> dict[str, float]:
        """Of the code: a rate divided by 1.000004 each batch of 100; momentum from 0.5 to 0.7 in 250 epochs of 50,000."""
        rate = max(1e-6, self.learning_rate * 1.000004 ** (-images_seen / 100))
        return {"lr": rate, "momentum": 0.5 + 0.2 * min(1.0, images_seen / 12_500_000)}


class Maxout(nn.Module):
    """The largest of five affine maps, unit by unit: (N, features) to (N, units). arXiv:1302.4389, Section 2."""

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        self.pieces = nn.Linear(features, 5 * units)

    def forward(self, inputs: Tensor) -> Tensor:
        """The pieces of a unit lie next to each other."""
        return self.pieces(inputs).unflatten(1, (-1, 5)).amax(2)
