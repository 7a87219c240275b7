"""A method that uses all features of the base class: Wasserstein GAN with gradient penalty on digits."""

import torch
from torch import Tensor, nn

from modules.losses.adversarial import gradient_penalty
from modules.tasks.generation import GenerativeMethod
from modules.training.ema import EMA
from modules.training.phases import Batch, Phase


class WGANGP(GenerativeMethod):
    """Updates the generator twice in every second step, clips the critic's gradient, and averages the generator's weights."""

    double_backward_networks = ("critic",)

    def __init__(self, total_images: int = 60, learning_rate: float = 1e-3, seed: int = 0) -> None:
        super().__init__(16, "normal", total_images, learning_rate, seed)
        self.save_hyperparameters()
        self.generator = nn.Sequential(nn.Linear(16, 64), nn.Softplus(), nn.Linear(64, 784), nn.Sigmoid())
        self.critic = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.Softplus(), nn.Linear(64, 1))
        self.average = EMA(self.generator, half_life=32)

    def sample(self, latents: Tensor) -> Tensor:
        return self.average(latents).view(-1, 1, 28, 28)

    def forward(self, latents: Tensor) -> Tensor:
        return self.sample(latents)

    def phases(self) -> list[Phase]:
        return [
            Phase("critic", self.critic_losses, max_grad_norm=0.7),
            Phase("generator", self.generator_losses, every_n_steps=2, n_updates=2),
        ]

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            name: torch.optim.Adam(getattr(self, name).parameters(), betas=(0.0, 0.9), eps=1e-3)
            for name in ("critic", "generator")
        }

    def shared_forward(self, batch: Batch) -> Batch:
        return {"fake": self.generator(self.batch_latents(batch)).view(-1, 1, 28, 28)}

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        fake = batch["fake"].detach()
        alpha = self.batch_noise(batch, "mixing", 1, "uniform")
        return {
            "real": -self.critic(batch["image"]).mean(),
            "fake": self.critic(fake).mean(),
            "penalty": 10 * gradient_penalty(self.critic, batch["image"], fake, alpha),
        }

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"adversarial": -self.critic(batch["fake"]).mean()}


class LazyPenaltyGAN(WGANGP):
    """Penalizes the gradient of a piecewise linear critic in its own phase; without hidden units, the critic is linear."""

    def __init__(self, total_images: int = 60, learning_rate: float = 1e-3, seed: int = 0, hidden_size: int = 64) -> None:
        super().__init__(total_images, learning_rate, seed)
        self.save_hyperparameters()
        hidden = [nn.Linear(784, hidden_size), nn.LeakyReLU(0.2)] if hidden_size else []
        self.critic = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(hidden_size or 784, 1))

    def phases(self) -> list[Phase]:
        return [*super().phases(), Phase("penalty", self.penalty, optimizer="critic")]

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"fake": self.critic(batch["fake"].detach()).mean() - self.critic(batch["image"]).mean()}

    def penalty(self, batch: Batch) -> dict[str, Tensor]:
        alpha = self.batch_noise(batch, "mixing", 1, "uniform")
        return {"penalty": 10 * gradient_penalty(self.critic, batch["image"], batch["fake"], alpha)}
