"""Two toy examples of alternating training: a bilinear game without convergence, and a GAN with mode collapse.

The game V(x, y) = x y is from Section 7 of Goodfellow's tutorial (arXiv:1701.00160, 2016). The ring of Gaussians is from
Metz et al., Unrolled Generative Adversarial Networks (arXiv:1611.02163, 2017), Section 3.1.
"""

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.transforms.draw import scatter_plot
from modules.losses.adversarial import bce_fake, bce_real, gan_generator_loss
from modules.tasks.generation import GenerativeMethod
from modules.training.method import Method
from modules.training.optimizers import kernels
from modules.training.phases import Batch, Phase, batch_size_of


class BilinearGame(Method):
    """Bilinear game: x minimizes and y maximizes V = x y by alternating gradient steps; (x, y) circles the solution (0, 0).

    Each batch has one dummy sample and updates both players; its content is not used.

    Args:
        total_images: training budget, in steps.
        learning_rate: learning rate of both players.
    """

    trajectory: Tensor

    def __init__(self, total_images: int = 1_000, learning_rate: PositiveFloat = 0.1) -> None:
        super().__init__(total_images, learning_rate)
        self.save_hyperparameters()
        self.constant_after_warmup = True
        self.x = nn.Linear(1, 1, bias=False)
        self.y = nn.Linear(1, 1, bias=False)
        for player in (self.x, self.y):
            nn.init.ones_(player.weight)
        self.register_buffer("trajectory", torch.ones(total_images + 1, 2))  # (x, y) after each step

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Require a global batch size of one.

        Raises:
            UserError: the global batch size is not 1.
        """
        super().on_train_batch_start(batch, batch_idx)
        if batch_size_of(batch) * self.trainer.world_size != 1:
            raise UserError("data.batch_size: the game needs a global batch size of 1. Set it to 1 and use one device.")

    def phases(self) -> list[Phase]:
        """Return the phases: gradient descent on V for x, then on -V for y."""
        return [
            Phase("x", lambda _: {"value": self.value()}),
            Phase("y", lambda _: {"value": -self.value()}),
        ]

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Create plain gradient descent for each player."""
        return {"x": torch.optim.SGD(self.x.parameters()), "y": torch.optim.SGD(self.y.parameters())}

    def value(self) -> Tensor:
        """Compute V = x y, a scalar."""
        return (self.x.weight * self.y.weight).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run a training step and record (x, y) after it."""
        super().training_step(batch, batch_idx)
        self.trajectory[self.images_seen] = torch.stack([self.x.weight, self.y.weight]).detach().view(2)

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Return the trajectory so far, (steps + 1, 2), as "prediction"."""
        return {"prediction": self.trajectory[: self.images_seen + 1]}

    preview_limit = 1

    def preview(self, outputs: Batch) -> Tensor:
        """Plot the trajectory in the plane: (1, 3, H, W) in [0, 1]."""
        return scatter_plot(outputs["prediction"], outputs["prediction"][:0])


class RingGAN(GenerativeMethod):
    """GAN on points of the plane. Its generator jumps from mode to mode, as in Metz et al., Figure 2.

    The networks are those of the paper's Appendix A. The learning rates, 1e-3 and 1e-4, are those of the authors' notebook.
    With them, the collapse appears within one minute of training.

    Args:
        loss: generator loss: "saturating", as in the paper, or "non-saturating".
        total_images: training budget, in points.
        learning_rate: learning rate of the generator; the discriminator has a tenth of this value.
        seed: seed of the noise in training.
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
        """Generate points (N, 2) from latents (N, 256)."""
        return self.generator(latents)

    def forward(self, latents: Tensor) -> Tensor:
        """See `sample`."""
        return self.sample(latents)

    def phases(self) -> list[Phase]:
        """Return the phases: D, then G."""
        return [
            Phase("discriminator", self.discriminator_losses, lambda _: {"lr": 0.1 * self.learning_rate}),
            Phase("generator", self.generator_losses, lambda _: {"lr": self.learning_rate}),
        ]

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Create an Adam optimizer for each network."""
        return {
            "discriminator": torch.optim.Adam(self.discriminator.parameters(), betas=(0.5, 0.999), **kernels(self.device)),
            "generator": torch.optim.Adam(self.generator.parameters(), betas=(0.5, 0.999), **kernels(self.device)),
        }

    def shared_forward(self, batch: Batch) -> Batch:
        """Generate the fakes."""
        return {"fake": self.generator(self.batch_latents(batch))}

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute eq. 1 of Goodfellow et al., arXiv:1406.2661, on points divided by 4."""
        real, fake = self.discriminator(batch["point"] / 4), self.discriminator(batch["fake"].detach() / 4)
        return {"real": bce_real(real), "fake": bce_fake(fake)}

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the saturating or non-saturating loss of Goodfellow et al., Section 3."""
        return {"adversarial": gan_generator_loss(self.discriminator(batch["fake"] / 4), self.loss)}

    def preview(self, outputs: Batch) -> Tensor:
        """Plot the samples over real points: (1, 3, H, W) in [0, 1]."""
        return scatter_plot(outputs["prediction"], outputs["point"])
