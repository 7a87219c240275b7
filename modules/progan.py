"""ProGAN: progressive growing of GANs.

T. Karras, T. Aila, S. Laine, J. Lehtinen. Progressive Growing of GANs for Improved Quality, Stability, and Variation.
ICLR 2018. arXiv:1710.10196.

Differences from the paper and the authors' code:

1. The weights of the generator are averaged by images, and not by steps: the average has a half-life of 11,085 images, a factor
   of 0.999 in each step of 16 images, in all stages. In the authors' code, the average is shorter for the small batches of
   large images, and longer for the large batches of the TensorFlow preset.
2. The weight of new layers increases in each step. In the authors' TensorFlow code, it is constant for four steps.
3. Statistics over the batch (Section 3, and the normalization of rows a to c of Table 1) are over the samples of a device and
   micro-batch. `minibatch_group` fixes the number of samples for the standard deviation.
4. With several updates of the discriminator for each one of the generator (`critic_steps`, rows a to c of Table 1), images are
   counted at the discriminator, as in the authors' code.
5. In a step, the discriminator and the generator are trained on the same fakes. The authors' code generates new ones for the
   generator.
6. With batch normalization (rows a to c), samples are generated with fixed statistics, computed for the averaged weights
   from 4,096 latents before each evaluation: a sample depends on its latent alone. The authors use those of a batch of samples.
7. The minibatch discrimination (row e*) starts with scales of 1. The authors' code computes the initial scales from images.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.random.noise import normal
from modules.losses.adversarial import gradient_penalty
from modules.losses.precision import to_float32
from modules.networks.batch_norm import reset_bn_stats
from modules.networks.progressive import Discriminator, Generator, Layers, Normalization, level_of, side_of, upsample
from modules.tasks.generation import GenerativeMethod
from modules.training.ema import EMA
from modules.training.phases import Batch, Phase
from modules.training.stages import Stage, StagePlan


class ProGAN(GenerativeMethod):
    """Section 2: both networks start at 4 x 4 pixels; layers for twice the size are added and faded in again and again.

    The training at a size consists of `fade_images`, during which its new layers are faded in, and of `stable_images`. The
    first size, 4 x 4, has no fade-in. The last size is trained until `total_images`.

    Args:
        size: side of the images in pixels, a power of 2.
        channels: image channels, 1 or 3.
        latent_size: dimension of the latents.
        base_channels, max_channels: width of the networks, see `modules.networks.progressive.channels_at`.
        grow: grow the networks; otherwise, they have their full size from the start.
        stable_images, fade_images: images of each stage.
        batch_sizes: batch size by side of the images; that of the datamodule for sides that are not listed.
        learning_rates: learning rate by side of the images; `learning_rate` for sides that are not listed.
        rampup_images: images after the start of training over which the learning rate rises, as in the authors' code.
        equalized_lr: scale the weights at run time (Section 4.1).
        normalize_latents: normalize the latents to a hypersphere (Appendix A.1).
        normalization: "pixel" (Section 4.2), "batch" (rows a to c of Table 1) or "none".
        minibatch: statistics over the batch: "stddev" (Section 3), "discrimination" (row e*) or "none".
        minibatch_group: consecutive samples of which the standard deviation is computed; null for all on a device.
        fused_scale: average pixels in the discriminator before LeakyReLU, see `modules.networks.progressive.Layers`.
        critic_steps: updates of the discriminator for each one of the generator.
        penalty_target: norm of the discriminator's gradient at which the penalty is zero.
        penalty_weight: weight of the gradient penalty, divided by the square of `penalty_target`.
        drift: weight of the squared score of real images (Appendix A.1).
        beta2: Adam's beta2; beta1 is 0.
        total_images: training budget in images.
        learning_rate: Adam learning rate of both networks.
        average_half_life: images after which the weight of old generator weights has halved in their average.
        seed: seed of the noise in training.

    Raises:
        UserError: `size` is not a power of 2, the last stage starts after `total_images`, `base_channels` is too
            small, or a side is not valid.
    """

    double_backward_networks = ("discriminator",)
    training_only_modules = ("discriminator", "generator")
    images_trained: Tensor

    def __init__(
        self,
        size: PositiveInt = 1024,
        channels: Literal[1, 3] = 3,
        latent_size: PositiveInt = 512,
        base_channels: PositiveInt = 8192,
        max_channels: PositiveInt = 512,
        grow: bool = True,
        stable_images: PositiveInt = 800_000,
        fade_images: PositiveInt = 800_000,
        batch_sizes: dict[int, PositiveInt] | None = None,
        learning_rates: dict[int, PositiveFloat] | None = None,
        rampup_images: NonNegativeInt = 0,
        equalized_lr: bool = True,
        normalize_latents: bool = True,
        normalization: Normalization = "pixel",
        minibatch: Literal["stddev", "discrimination", "none"] = "stddev",
        minibatch_group: PositiveInt | None = None,
        fused_scale: bool = False,
        critic_steps: PositiveInt = 1,
        penalty_target: PositiveFloat = 1.0,
        penalty_weight: NonNegativeFloat = 10.0,
        drift: NonNegativeFloat = 1e-3,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.99,
        total_images: int = 19_000_000,
        learning_rate: PositiveFloat = 1e-3,
        average_half_life: PositiveInt = 11_085,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_size, "normal", total_images, learning_rate, seed)
        self.save_hyperparameters()
        self.size, self.channels, self.last_level = size, channels, level_of(size)
        self.grow, self.stable_images, self.fade_images = grow, stable_images, fade_images
        self.batch_sizes = self.check_sides("batch_sizes", batch_sizes)
        self.learning_rates = self.check_sides("learning_rates", learning_rates)
        self.rampup_images, self.critic_steps, self.drift, self.beta2 = rampup_images, critic_steps, drift, beta2
        self.penalty_target, self.penalty_weight = penalty_target, penalty_weight
        if (last := self.stages()[-1].start) >= total_images:
            raise UserError(
                f"model.total_images: the stage of {size} x {size} pixels starts after {last} images, but the training ends "
                f"after {total_images}. Increase model.total_images, or reduce model.stable_images or model.fade_images"
            )
        if 2 * base_channels < size:
            raise UserError(
                f"model.base_channels: {base_channels} is too small for model.size {size}. Use at least {size // 2}"
            )
        self.has_stddev, self.group_size = minibatch == "stddev", minibatch_group
        self.has_batch_statistics = normalization == "batch"
        layers = Layers(equalized_lr, normalize_latents, normalization, minibatch, minibatch_group, fused_scale)
        self.generator = Generator(size, channels, latent_size, base_channels, max_channels, layers)
        self.discriminator = Discriminator(size, channels, base_channels, max_channels, layers)
        self.average = EMA(self.generator, average_half_life)  # Appendix A.1
        # Images before the newest step, from which the level of the weights follows, also in files of weights.
        self.register_buffer("images_trained", torch.tensor(0))
        self.level = self.level_at(0)

    def check_sides(self, name: str, values: Mapping[int, int | float] | None) -> Mapping[int, int | float]:
        """Check the keys of a setting by side.

        Raises:
            UserError: a side is not that of a stage.
        """
        sides = [side_of(level) for level in range(0 if self.grow else self.last_level, self.last_level + 1)]
        for side in values or {}:
            if side not in sides:
                raise UserError(
                    f"model.{name}: {side} is not a side of model.size {self.size}. Use {', '.join(map(str, sides))}"
                )
        return values or {}

    # Section 2 and Appendix A.1: growing

    def level_at(self, images_seen: int) -> float:
        """Return the level of the step after `images_seen` images; the fraction is the weight of the new layers (Figure 2)."""
        if not self.grow:
            return float(self.last_level)
        level, images = divmod(images_seen, self.stable_images + self.fade_images)
        weight_new = max(0, images - self.stable_images + 1) / self.fade_images
        return min(level + weight_new, float(self.last_level))

    def stages(self) -> list[Stage]:
        """Return the stages: one at 4 x 4 pixels, then two for each size: during its fade-in, and after it."""
        if not self.grow:
            return [self.stage(0, self.size)]
        stages = [self.stage(0, side_of(0))]
        for level in range(1, self.last_level + 1):
            end = level * (self.stable_images + self.fade_images)  # of the fade-in
            stages += [self.stage(end - self.fade_images, side_of(level)), self.stage(end, side_of(level))]
        return stages

    def stage(self, start: int, side: int) -> Stage:
        """Return the stage of a side that starts after some images."""
        batch_size = self.batch_sizes.get(side)
        return Stage(start, None if batch_size is None else int(batch_size), reset_optimizers=start > 0, image_size=side)

    def schedule(self, images_seen: int) -> float:
        """Return the learning rate for the side of the images, which can rise at the start of training."""
        rate = self.learning_rates.get(side_of(self.level_at(images_seen)), self.learning_rate)
        remaining = max(0.0, 1 - images_seen / max(1, self.rampup_images))
        return rate * math.exp(-5 * remaining**2)

    def plan_stages(self, data: Any) -> StagePlan:
        """Plan the stages for a datamodule, and check the groups of the standard deviation.

        Raises:
            UserError: a device and micro-batch has one sample, or more samples than a group, and not a multiple of it.
        """
        plan = super().plan_stages(data)
        parts = data.rank_and_world_size[1] * self.accumulate_grad_batches
        for batch_size in plan.batch_sizes if self.has_stddev else []:
            local = batch_size // parts
            group = min(self.group_size or local, local)
            if group < 2 or local % group:
                raise UserError(
                    f"model.minibatch_group: the standard deviation cannot be computed over groups of {group} of the {local} "
                    f"samples on a device and in a micro-batch ({parts} parts of a batch of {batch_size}). Change it, the "
                    "batch size, or the number of devices"
                )
        return plan

    # Generation

    def sample(self, latents: Tensor) -> Tensor:
        """Generate images (N, channels, size, size) in [0, 1] with the averaged weights.

        During the growth, the images of the current level are enlarged by repeating pixels.
        """
        image = self.average.network(latents, self.level)
        return F.interpolate(image, (self.size, self.size)).add(1).div(2).clamp(0, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """See `sample`."""
        return self.sample(latents)

    # Training

    def phases(self) -> list[Phase]:
        """Return the phases: D, then G."""
        return [
            Phase("discriminator", self.discriminator_losses),
            Phase("generator", self.generator_losses, every_n_steps=self.critic_steps),
        ]

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Create one Adam optimizer for each network, without momentum (Appendix A.1)."""
        return {"discriminator": self.adam(self.discriminator), "generator": self.adam(self.generator)}

    def adam(self, network: nn.Module) -> torch.optim.Optimizer:
        """Create Adam with beta1 = 0 and `beta2`."""
        return torch.optim.Adam(network.parameters(), betas=(0.0, self.beta2), fused=True)

    def shared_forward(self, batch: Batch) -> Batch:
        """Generate the fakes, and blend the real images with their half-size versions as the networks do (Figure 2)."""
        self.images_trained.fill_(self.images_seen)
        self.level = self.level_at(self.images_seen)
        real = batch["image"] * 2 - 1
        if weight_new := self.level % 1:
            real = torch.lerp(upsample(F.avg_pool2d(real, 2)), real, weight_new)
        return {"real": real, "fake": self.generator(self.batch_latents(batch), self.level)}

    def score(self, image: Tensor) -> Tensor:
        """Score images of the current level: (N, 1)."""
        return self.discriminator(image, self.level)

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of WGAN-GP (Gulrajani et al., arXiv:1704.00028, eq. 3), and the drift term (Appendix A.1)."""
        fake, real_score = batch["fake"].detach(), to_float32(self.score(batch["real"]))
        mixing = self.batch_noise(batch, "mixing", 1, "uniform")
        penalty = gradient_penalty(self.score, batch["real"], fake, mixing, self.penalty_target)
        return {
            "real": -real_score.mean(),
            "fake": to_float32(self.score(fake)).mean(),
            "penalty": self.penalty_weight * penalty,
            "drift": self.drift * real_score.square().mean(),
        }

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the generator loss of WGAN-GP."""
        return {"adversarial": -to_float32(self.score(batch["fake"])).mean()}

    # Batch normalization (rows a to c)

    def on_validation_start(self) -> None:
        """Compute the statistics of batch normalization for the averaged weights."""
        super().on_validation_start()
        if self.has_batch_statistics:
            self.compute_statistics()

    on_test_start = on_validation_start

    def compute_statistics(self) -> None:
        """Compute the mean and the variance of the features over 4,096 latents, for the averaged weights."""
        network = self.average.network.train()
        reset_bn_stats(network)
        with torch.no_grad():
            for start in range(0, 4096, 128):
                latents = normal(self.seed, "statistics", range(start, start + 128), self.latent_dim)
                network(torch.from_numpy(latents).to(self.dtype).to(self.device), self.level)
        network.eval()

    # Weights and compilation

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, and set their level."""
        result = super().load_state_dict(state_dict, strict, assign)
        self.level = self.level_at(int(self.images_trained))
        return result

    def compile_networks(self) -> None:
        """Compile the blocks of the generator in place; the level selects among them outside of the compiled code."""
        for block in [*self.generator.blocks, *self.generator.to_rgb]:
            block.compile()
