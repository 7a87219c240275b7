"""Wasserstein GANs on points of the plane: weight clipping, and the gradient penalty.

M. Arjovsky, S. Chintala, L. Bottou. Wasserstein GAN. ICML 2017. arXiv:1701.07875.
I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin, A. Courville. Improved Training of Wasserstein GANs. NIPS 2017.
arXiv:1704.00028.

Differences from the papers, with reasons:

1. The data are points of the plane, the toy data of the second paper, Section 3. The first paper has images only.
2. Adam has beta1 = 0.5 and beta2 = 0.9, and the penalty the weight 0.1, as in the second authors' code for points. For images,
   their paper has beta1 = 0 and the weight 10.
3. The critic has `critic_steps` updates for each one of the generator. In the first authors' code, it has 100 for the first 25
   updates of the generator, and for every 500th one.
4. The latents are normal and have two dimensions, as in the second authors' code for points.
"""

from functools import partial
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.transforms.draw import contour_plot
from modules.losses.adversarial import gradient_penalty
from modules.losses.precision import to_float32
from modules.tasks.generation import GenerativeMethod
from modules.training.optimizers import kernels
from modules.training.phases import Batch, Phase

GRID = 120  # positions per side at which the critic is drawn


class WGAN(GenerativeMethod):
    """Wasserstein GAN: the critic estimates the Wasserstein distance, and is kept Lipschitz continuous.

    Args:
        constraint: "clipping" of the critic's weights (Arjovsky et al., Algorithm 1), or the gradient "penalty" (Gulrajani et
            al., eq. 3).
        generator: a "network", or "fixed": real points with Gaussian noise, which shows the optimal critic (Gulrajani et al.,
            Section 3).
        clip: largest absolute value of the critic's weights, for clipping.
        penalty_weight: weight of the gradient penalty.
        critic_steps: updates of the critic for each one of the generator.
        base_channels: units of each of the three hidden layers.
        total_images: training budget in points.
        learning_rate: learning rate; 5e-5 for clipping (RMSProp), 1e-4 for the penalty (Adam).
        seed: seed of the noise in training.
    """

    double_backward_networks = ("critic",)

    def __init__(
        self,
        constraint: Literal["clipping", "penalty"] = "penalty",
        generator: Literal["network", "fixed"] = "network",
        clip: PositiveFloat = 0.01,
        penalty_weight: PositiveFloat = 0.1,
        critic_steps: PositiveInt = 5,
        base_channels: PositiveInt = 512,
        total_images: int = 12_800_000,
        learning_rate: PositiveFloat = 1e-4,
        seed: int = 0,
    ) -> None:
        super().__init__(2, "normal", total_images, learning_rate, seed)
        self.save_hyperparameters()
        self.constant_after_warmup = True
        self.constraint, self.has_fixed_generator, self.weight_limit = constraint, generator == "fixed", clip
        self.penalty_weight, self.critic_steps = penalty_weight, critic_steps
        self.critic = mlp(base_channels, 1)
        self.generator = nn.Sequential() if self.has_fixed_generator else mlp(base_channels, 2)

    def sample(self, latents: Tensor) -> Tensor:
        """Generate points (N, 2) from latents (N, 2).

        Raises:
            UserError: the generator is fixed; its points are real points with noise.
        """
        if self.has_fixed_generator:
            raise UserError("model.generator: fixed has no samples. Use network")
        return self.generator(latents)

    def forward(self, latents: Tensor) -> Tensor:
        """See `sample`."""
        return self.sample(latents)

    # Algorithm 1 of both papers

    def phases(self) -> list[Phase]:
        """Return the phases: the critic, then the generator in every `critic_steps`-th step."""
        critic = Phase("critic", self.critic_losses)
        if self.has_fixed_generator:
            return [critic]
        return [critic, Phase("generator", self.generator_losses, every_n_steps=self.critic_steps)]

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Create RMSProp for clipping, which follows each update of the critic, or Adam for the penalty."""
        networks = {"critic": self.critic} if self.has_fixed_generator else {"critic": self.critic, "generator": self.generator}
        if self.constraint == "penalty":
            return {
                name: torch.optim.Adam(network.parameters(), betas=(0.5, 0.9), **kernels(self.device))
                for name, network in networks.items()
            }
        optimizers = {name: torch.optim.RMSprop(network.parameters(), foreach=True) for name, network in networks.items()}
        optimizers["critic"].register_step_post_hook(partial(limit_weights, self.weight_limit))
        return dict(optimizers)

    def shared_forward(self, batch: Batch) -> Batch:
        """Generate the fakes."""
        latents = self.batch_latents(batch)
        return {"fake": batch["point"] + latents if self.has_fixed_generator else self.generator(latents)}

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the negative estimate of the Wasserstein distance, and the gradient penalty."""
        fake = batch["fake"].detach()
        terms = {"real": -self.score(batch["point"]).mean(), "fake": self.score(fake).mean()}
        if self.constraint == "penalty":
            mixing = self.batch_noise(batch, "mixing", 1, "uniform")
            terms["penalty"] = self.penalty_weight * gradient_penalty(self.critic, batch["point"], fake, mixing)
        return terms

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the generator loss, the negative mean score of the fakes."""
        return {"adversarial": -self.score(batch["fake"]).mean()}

    def score(self, points: Tensor) -> Tensor:
        """Return the critic's values of points (N, 2) in float32: (N, 1)."""
        return to_float32(self.critic(points))

    # Gulrajani et al., Section 3: level sets of the critic

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Add samples as "prediction", and the critic's values on a grid around the real points as "value" (GRID, GRID)."""
        latents = self.sample_latents(batch["index"].tolist(), self.seed)
        count = len(batch["point"])
        fixed = batch["point"][torch.arange(len(latents)) % count] + latents if self.has_fixed_generator else None
        axis = 1.2 * batch["point"].abs().max() * torch.linspace(-1, 1, GRID, device=self.device)
        y, x = torch.meshgrid(axis.flip(0), axis, indexing="ij")  # the first row is at the top
        value = self.critic(torch.stack([x, y], dim=2).flatten(0, 1)).view(GRID, GRID)
        return {**batch, "prediction": self.sample(latents) if fixed is None else fixed, "value": value}

    test_step = validation_step

    def preview(self, outputs: Batch) -> Tensor:
        """Draw the level sets of the critic, real points, and samples of a trained generator: (1, 3, H, W) in [0, 1]."""
        samples = outputs["prediction"][:0] if self.has_fixed_generator else outputs["prediction"][:500]
        return contour_plot(outputs["value"], outputs["point"], samples)


def limit_weights(limit: float, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Limit all weights of an optimizer to [-limit, limit] (Arjovsky et al., Algorithm 1); a hook after its updates."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.clamp_(-limit, limit)


def mlp(width: int, outputs: int) -> nn.Sequential:
    """Create a network with three hidden layers of ReLUs, from points (N, 2) to (N, outputs).

    The weights of the hidden layers are initialized as by He et al., those of the last layer as by Glorot and Bengio.
    """
    hidden = [nn.Linear(inputs, width) for inputs in (2, width, width)]
    last = nn.Linear(width, outputs)
    for layer in hidden:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    nn.init.xavier_uniform_(last.weight)
    for layer in (*hidden, last):
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*(part for layer in hidden for part in (layer, nn.ReLU())), last)
