"""CycleGAN: image translation between two domains, trained on unpaired images.

J.-Y. Zhu, T. Park, P. Isola, A. A. Efros. Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks.
ICCV 2017. arXiv:1703.10593.

Differences from the paper and the authors' code:

1. The paper's G is called `G_AB`, and its F, from B to A, `G_BA`.
2. In the second half of the training the learning rate falls with every image, not every epoch: sets of different sizes have
   no common epoch.
3. The identity loss (Section 5.2, for paintings to photographs, and the flowers) is off by default. The authors' PyTorch code
   enables it for every task.
4. All ranks share one image pool, see `modules.training.image_pool`; for a batch of one it equals the authors'.
5. Label maps are resized by nearest neighbour, without interpolation; unlabelled pixels are black.
6. Losses that are removed in the ablations of Section 5.1.4 are not computed; without adversarial losses there are no
   discriminators.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from datamodules.errors import UserError
from modules.losses.precision import to_float32
from modules.networks.init import dcgan_init_
from modules.tasks.translation import Direction, TranslationMethod
from modules.training.image_pool import ImagePool
from modules.training.method import Batch
from modules.training.phases import Phase
from modules.training.stages import Stage

Objective = Literal["full", "cycle", "gan", "gan-cycle-A", "gan-cycle-B"]
CYCLE_TERMS = {"full": "AB", "cycle": "AB", "gan": "", "gan-cycle-A": "A", "gan-cycle-B": "B"}  # domains with a cycle loss
MIN_CROP = 24  # pixels; the discriminator output is empty below


class CycleGAN(TranslationMethod):
    """Section 3: two generators and two discriminators with adversarial and cycle-consistency losses.

    Args:
        crop: side of the training crops in pixels.
        n_residual_blocks: residual blocks per generator; 6 in the paper for 128 pixels, 9 from 256 pixels.
        base_channels: channels of the first layer of every network.
        objective: "full", or an ablation: "cycle", "gan", "gan-cycle-A" (A to B to A) or "gan-cycle-B". The paper's forward
            cycle starts at its x, in its ablation the label maps.
        cycle_weight: lambda of eq. 3.
        identity_weight: weight of the identity loss as a fraction of `cycle_weight`: 0 for none, 0.5 in the paper.
        pool_size: capacity of each pool of earlier fakes for the discriminators.
        total_images: training budget, in pairs of one image of A and one of B.
        learning_rate: Adam learning rate; constant in the first half, then falling linearly to zero.
        seed: seed of the image pools.

    Raises:
        UserError: an argument is not valid.
    """

    training_only_modules = ("pool_a", "pool_b")

    def __init__(
        self,
        crop: int = 256,
        n_residual_blocks: int = 9,
        base_channels: int = 64,
        objective: Objective = "full",
        cycle_weight: NonNegativeFloat = 10.0,
        identity_weight: NonNegativeFloat = 0.0,
        pool_size: int = 50,
        total_images: int = 200_000,
        learning_rate: PositiveFloat = 2e-4,
        seed: int = 0,
    ) -> None:
        super().__init__(total_images, learning_rate, seed=seed)
        self.save_hyperparameters()
        if objective not in CYCLE_TERMS:
            raise UserError(f"model.objective: {objective}; use one of {', '.join(CYCLE_TERMS)}")
        if crop % self.stride or crop < MIN_CROP:
            raise UserError(f"model.crop: {crop} must be a multiple of {self.stride} and at least {MIN_CROP}")
        sizes = (("base_channels", base_channels, 1), ("n_residual_blocks", n_residual_blocks, 0), ("pool_size", pool_size, 0))
        for name, value, minimum in sizes:
            if value < minimum:
                raise UserError(f"model.{name}: {value} must be at least {minimum}")
        self.cycles = CYCLE_TERMS[objective]
        self.cycle_weight, self.identity_weight = cycle_weight, identity_weight
        self.G_AB, self.G_BA = (generator(base_channels, n_residual_blocks) for _ in "AB")
        self.adversarial = objective != "cycle"
        if self.adversarial:
            self.D_A, self.D_B = (discriminator(base_channels) for _ in "AB")
            self.pool_a, self.pool_b = (ImagePool(pool_size, (3, crop, crop), f"pool/{name}", seed) for name in "AB")
        dcgan_init_(self)
        for name, values in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(values)

    def forward(self, image: Tensor, direction: Direction = "AtoB") -> Tensor:
        """Translate images (N, 3, H, W) in [0, 1] to the same shape; H and W must be multiples of 4."""
        translate = self.G_AB if direction == "AtoB" else self.G_BA
        return (to_float32(translate(image * 2 - 1)) + 1) / 2

    # Section 4, "Training details"

    def phases(self) -> list[Phase]:
        """Update both generators together, then both discriminators."""
        phases = [Phase("generators", self.generator_losses, self.linear_decay_after_half)]
        if self.adversarial:
            phases.append(Phase("discriminators", self.discriminator_losses, self.linear_decay_after_half))
        return phases

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One Adam for both generators, and one for both discriminators."""
        optimizers = {"generators": self.adam(self.G_AB, self.G_BA)}
        if self.adversarial:
            optimizers["discriminators"] = self.adam(self.D_A, self.D_B)
        return optimizers

    def adam(self, *networks: nn.Module) -> torch.optim.Optimizer:
        """Adam (Section 7.1); a beta1 of 0.5 as in the authors' code."""
        parameters = [parameter for network in networks for parameter in network.parameters()]
        return torch.optim.Adam(parameters, betas=(0.5, 0.999), fused=True)

    def linear_decay_after_half(self, images_seen: int) -> dict[str, float]:
        """Learning rate (Section 7.1): constant in the first half, then linear decay to zero."""
        return {"lr": self.learning_rate * min(1.0, 2 - 2 * images_seen / self.total_images)}

    def stages(self) -> list[Stage]:
        """Stages (Section 7.1): the learning rate falls from the middle on."""
        return [Stage(), Stage(self.total_images // 2)] if self.total_images > 1 else [Stage()]

    def shared_forward(self, batch: Batch) -> Batch:
        """Compute images in [-1, 1] and their translations for both phases.

        For the identity loss, each generator gets both domains in one pass: instance normalisation treats images separately.
        """
        a, b = batch["A"] * 2 - 1, batch["B"] * 2 - 1
        if not self.identity_weight:
            return {"a": a, "b": b, "fake_b": self.G_AB(a), "fake_a": self.G_BA(b)}
        fake_b, identity_b = self.G_AB(torch.cat([a, b])).chunk(2)
        fake_a, identity_a = self.G_BA(torch.cat([b, a])).chunk(2)
        return {"a": a, "b": b, "fake_b": fake_b, "fake_a": fake_a, "identity_b": identity_b, "identity_a": identity_a}

    # Section 3

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 3, with least-squares adversarial losses instead of eq. 1 (Section 4)."""
        terms = {}
        if self.adversarial:
            terms["adversarial/B"] = lsgan_loss(self.D_B(batch["fake_b"]), 1)
            terms["adversarial/A"] = lsgan_loss(self.D_A(batch["fake_a"]), 1)
        if "A" in self.cycles:  # eq. 2: x -> G(x) -> F(G(x))
            terms["cycle/A"] = self.cycle_weight * F.l1_loss(to_float32(self.G_BA(batch["fake_b"])), batch["a"])
        if "B" in self.cycles:
            terms["cycle/B"] = self.cycle_weight * F.l1_loss(to_float32(self.G_AB(batch["fake_a"])), batch["b"])
        if self.identity_weight:  # Section 5.2
            weight = self.identity_weight * self.cycle_weight
            terms["identity/A"] = weight * F.l1_loss(to_float32(batch["identity_a"]), batch["a"])
            terms["identity/B"] = weight * F.l1_loss(to_float32(batch["identity_b"]), batch["b"])
        return terms

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Least-squares losses on reals and pooled fakes, halved so that D learns more slowly (Section 7.1)."""
        terms = {}
        for name, network, pool in (("A", self.D_A, self.pool_a), ("B", self.D_B, self.pool_b)):
            fakes = pool.query(batch[f"fake_{name.lower()}"], batch["sample_ids"], self.images_seen)
            real, fake = network(torch.cat([batch[name.lower()], fakes])).chunk(2)
            terms[f"real/{name}"] = lsgan_loss(real, 1) / 2
            terms[f"fake/{name}"] = lsgan_loss(fake, 0) / 2
        return terms


def lsgan_loss(values: Tensor, target: float) -> Tensor:
    """Mean squared distance of a discriminator's output from the target."""
    return (to_float32(values) - target).square().mean()


# Section 7.2


def generator(base_channels: int, n_residual_blocks: int) -> nn.Sequential:
    """c7s1-64, d128, d256, R256 ..., u128, u64, c7s1-3: images in [-1, 1] to images in [-1, 1]."""
    layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, base_channels, 7), *norm_relu(base_channels)]
    for in_channels, out_channels in pairwise((base_channels, 2 * base_channels, 4 * base_channels)):
        layers += [nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), *norm_relu(out_channels)]
    layers += [ResidualBlock(4 * base_channels) for _ in range(n_residual_blocks)]
    for in_channels, out_channels in pairwise((4 * base_channels, 2 * base_channels, base_channels)):
        layers += [
            nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1),
            *norm_relu(out_channels),
        ]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(base_channels, 3, 7), nn.Tanh())


class ResidualBlock(nn.Module):
    """Rk: two 3 x 3 convolutions with a skip connection; no ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [[nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3)] for _ in range(2)]
        self.block = nn.Sequential(*convs[0], *norm_relu(channels), *convs[1], nn.InstanceNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to the same."""
        return x + self.block(x)


def norm_relu(channels: int) -> list[nn.Module]:
    """Instance normalisation without affine parameters, then ReLU."""
    return [nn.InstanceNorm2d(channels), nn.ReLU()]


def discriminator(base_channels: int) -> nn.Sequential:
    """C64-C128-C256-C512 and a final convolution: one value per patch of 70 x 70 pixels.

    The last two convolutions have stride 1, as in the authors' code; with stride 2, as in the text, patches would be larger.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, base_channels, 4, 2, 1), nn.LeakyReLU(0.2)]
    for in_channels, out_channels, stride in (
        (base_channels, 2 * base_channels, 2),
        (2 * base_channels, 4 * base_channels, 2),
        (4 * base_channels, 8 * base_channels, 1),
    ):
        layers += [nn.Conv2d(in_channels, out_channels, 4, stride, 1), nn.InstanceNorm2d(out_channels), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8 * base_channels, 1, 4, 1, 1))
