"""Two small games that show what alternating training does: one that never ends, and one whose generator forgets modes.

V(x, y) = x y is from Section 7 of Goodfellow's tutorial (arXiv:1701.00160, 2016), the ring of Gaussians from Metz et al.,
Unrolled Generative Adversarial Networks (arXiv:1611.02163, 2017), Section 3.1.
"""

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from datamodules.errors import UserError
from modules.losses.adversarial import bce_fake, bce_real, gan_generator_loss
from modules.tasks.generation import GenerativeMethod
from modules.training.method import Method
from modules.training.phases import Batch, Phase, batch_size_of


class BilinearGame(Method):
    """min over x, max over y of V = x y, by gradient steps in turn: (x, y) goes round the solution (0, 0) for ever.

    Each batch of one is a step of either player; what is in it does not matter.

    Args:
        total_images: training budget, in steps.
        learning_rate: of both players.
    """

    trajectory: Tensor

    def __init__(self, total_images: int = 1_000, learning_rate: PositiveFloat = 0.1) -> None:
        super().__init__(total_images, learning_rate)
        self.save_hyperparameters()
        self.x = nn.Linear(1, 1, bias=False)
        self.y = nn.Linear(1, 1, bias=False)
        for player in (self.x, self.y):
            nn.init.ones_(player.weight)
        self.register_buffer("trajectory", torch.ones(total_images + 1, 2))  # where the players were after each step

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Refuse a step that counts for several."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_size_of(batch) * self.trainer.world_size != 1:
            raise UserError("data.batch_size: a step of the game counts for one; take 1, and one device")

    def phases(self) -> list[Phase]:
        """Both with plain gradient descent."""
        return [
            Phase("x", [self.x], torch.optim.SGD, lambda _: {"value": self.value()}, self.constant_lr),
            Phase("y", [self.y], torch.optim.SGD, lambda _: {"value": -self.value()}, self.constant_lr),
        ]

    def value(self) -> Tensor:
        """V = x y."""
        return (self.x.weight * self.y.weight).sum()

    def constant_lr(self, images_seen: int) -> dict[str, float]:
        """The same learning rate throughout."""
        return {"lr": self.learning_rate}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take note of where the players are after it."""
        super().training_step(batch, batch_idx)
        self.trajectory[self.images_seen] = torch.stack([self.x.weight, self.y.weight]).detach().view(2)

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The path so far: (steps + 1, 2)."""
        return {"prediction": self.trajectory[: self.images_seen + 1]}


class RingGAN(GenerativeMethod):
    """A GAN on points of the plane, whose generator falls onto one mode after another, as in Metz et al., Figure 2.

    Networks after their Appendix A; the learning rates, 1e-3 and 1e-4, are those of the authors' notebook, which make the
    collapse plain within a minute.

    Args:
        loss: of the generator: "saturating", as there, or "non-saturating".
        total_images: training budget, in points.
        learning_rate: of the generator; the discriminator's is a tenth.
        seed: of the noise in training.
    """

    def __init__(
        self,
        loss: Literal["saturating", "non-saturating"] = "saturating",
        total_images: int = 12_800_000,
        learning_rate: PositiveFloat = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(256, "normal", total_images, learning_rate, seed)
        self.save_hyperparameters()
        self.loss = loss
        self.generator = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 1))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=0.8)
                nn.init.zeros_(layer.bias)

    def sample(self, latents: Tensor) -> Tensor:
        """Points (N, 2)."""
        return self.generator(latents)

    def forward(self, latents: Tensor) -> Tensor:
        """See `sample`."""
        return self.sample(latents)

    def phases(self) -> list[Phase]:
        """D, then G."""
        return [
            Phase("discriminator", [self.discriminator], self.adam, self.discriminator_losses, lambda _: self.lr(0.1)),
            Phase("generator", [self.generator], self.adam, self.generator_losses, lambda _: self.lr(1)),
        ]

    def adam(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Both with the same."""
        return torch.optim.Adam(parameters, betas=(0.5, 0.999))

    def lr(self, scale: float) -> dict[str, float]:
        """The same learning rate throughout."""
        return {"lr": scale * self.learning_rate}

    def shared_forward(self, batch: Batch) -> Batch:
        """The fakes."""
        return {"fake": self.generator(self.batch_latents(batch))}

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 1 of Goodfellow et al."""
        real, fake = self.discriminator(batch["point"] / 4), self.discriminator(batch["fake"].detach() / 4)
        return {"real": bce_real(real), "fake": bce_fake(fake)}

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """One of the two losses of Goodfellow et al., Section 3."""
        return {"adversarial": gan_generator_loss(self.discriminator(batch["fake"] / 4), self.loss)}
