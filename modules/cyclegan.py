"""CycleGAN: image translation between two domains, trained on unpaired images.

J.-Y. Zhu, T. Park, P. Isola, A. A. Efros. Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks.
ICCV 2017. arXiv:1703.10593.

Differences from the paper and the authors' code:

1. The paper's generators G (A to B) and F (B to A) are called `G_AB` and `G_BA`.
2. In the second half of training, the learning rate decreases with every image instead of every epoch. Sets of different
   sizes have no common epoch.
3. The identity loss (Section 5.2, for paintings to photographs and for flowers) is off by default. The authors' PyTorch code
   enables it for every task.
4. Each discriminator has one image pool for all ranks, see `modules.training.image_pool`. For a batch size of one, it is
   equivalent to the authors' pool.
5. Label maps are resized by nearest-neighbor interpolation, and unlabeled pixels are black.
6. Losses that are removed in the ablations of Section 5.1.4 are not computed. Without adversarial losses, the method has no
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
from modules.networks.build import NetworkSpec, build_network
from modules.networks.deterministic import ReflectionPad2d
from modules.networks.init import dcgan_init_
from modules.tasks.translation import Direction, TranslationMethod
from modules.training.image_pool import ImagePool
from modules.training.method import Batch
from modules.training.phases import Phase
from modules.training.stages import Stage

Objective = Literal["full", "cycle", "gan", "gan-cycle-A", "gan-cycle-B"]
CYCLE_TERMS = {"full": "AB", "cycle": "AB", "gan": "", "gan-cycle-A": "A", "gan-cycle-B": "B"}  # domains with a cycle loss
MIN_CROP = 24  # pixels; the discriminator output for a smaller crop is empty


class CycleGAN(TranslationMethod):
    """Section 3: two generators and two discriminators with adversarial and cycle-consistency losses.

    Args:
        crop: side of the training crops in pixels.
        n_residual_blocks: residual blocks per generator; 6 in the paper for 128 pixels, 9 from 256 pixels.
        base_channels: channels of the first layer of every network.
        objective: "full", or an ablation: "cycle", "gan", "gan-cycle-A" (A to B to A) or "gan-cycle-B". In the paper's
            ablation, the forward cycle starts at the label maps.
        cycle_weight: lambda of eq. 3.
        identity_weight: weight of the identity loss as a fraction of `cycle_weight`: 0 for no identity loss; 0.5 in the paper.
        pool_size: capacity of each pool of earlier fakes for the discriminators.
        total_images: training budget, in pairs of one image of A and one of B.
        learning_rate: Adam learning rate; constant in the first half, then falling linearly to zero.
        generator: another generator, for both directions, see `build_network`: (N, 3, H, W) in [-1, 1] to the same.
        discriminator: another discriminator, for both domains: such images to values of any shape.
        seed: seed of the image pools.

    Raises:
        UserError: `objective` or `crop` is not valid, or another size is too small.
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
        generator: NetworkSpec = None,
        discriminator: NetworkSpec = None,
        seed: int = 0,
    ) -> None:
        super().__init__(total_images, learning_rate, seed=seed)
        self.save_hyperparameters()
        if objective not in CYCLE_TERMS:
            raise UserError(f"model.objective: {objective} is not valid. Use one of {', '.join(CYCLE_TERMS)}")
        if crop % self.stride or crop < MIN_CROP:
            raise UserError(f"model.crop: {crop} is not valid. Use a multiple of {self.stride} that is at least {MIN_CROP}")
        sizes = (("base_channels", base_channels, 1), ("n_residual_blocks", n_residual_blocks, 0), ("pool_size", pool_size, 0))
        for name, value, minimum in sizes:
            if value < minimum:
                raise UserError(f"model.{name}: {value} is too small. Use at least {minimum}")
        self.cycles = CYCLE_TERMS[objective]
        self.cycle_weight, self.identity_weight = cycle_weight, identity_weight
        self.G_AB, self.G_BA = (
            build_network("generator", generator, make_generator(base_channels, n_residual_blocks)) for _ in "AB"
        )
        self.adversarial = objective != "cycle"
        if self.adversarial:
            self.D_A, self.D_B = (
                build_network("discriminator", discriminator, make_discriminator(base_channels)) for _ in "AB"
            )
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
        """Return the phases: both generators together, then both discriminators."""
        phases = [Phase("generators", self.generator_losses)]
        if self.adversarial:
            phases.append(Phase("discriminators", self.discriminator_losses))
        return phases

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Create one Adam optimizer for both generators, and one for both discriminators."""
        optimizers = {"generators": self.adam(self.G_AB, self.G_BA)}
        if self.adversarial:
            optimizers["discriminators"] = self.adam(self.D_A, self.D_B)
        return optimizers

    def adam(self, *networks: nn.Module) -> torch.optim.Optimizer:
        """Create Adam (Section 7.1), with a beta1 of 0.5 as in the authors' code."""
        parameters = [parameter for network in networks for parameter in network.parameters()]
        return torch.optim.Adam(parameters, betas=(0.5, 0.999), fused=True)

    def schedule(self, images_seen: int) -> float:
        """Return the learning rate (Section 7.1): constant in the first half, then linear decay to zero."""
        return self.learning_rate * min(1.0, 2 - 2 * images_seen / self.total_images)

    def stages(self) -> list[Stage]:
        """Return the two halves of training as stages; the learning rate decreases in the second (Section 7.1)."""
        return [Stage(), Stage(self.total_images // 2)] if self.total_images > 1 else [Stage()]

    def shared_forward(self, batch: Batch) -> Batch:
        """Compute images in [-1, 1] and their translations for both phases.

        For the identity loss, each generator processes both domains in one pass. The result is the same as in two passes,
        because instance normalization treats images separately.
        """
        a, b = batch["A"] * 2 - 1, batch["B"] * 2 - 1
        if not self.identity_weight:
            return {"a": a, "b": b, "fake_b": self.G_AB(a), "fake_a": self.G_BA(b)}
        fake_b, identity_b = self.G_AB(torch.cat([a, b])).chunk(2)
        fake_a, identity_a = self.G_BA(torch.cat([b, a])).chunk(2)
        return {"a": a, "b": b, "fake_b": fake_b, "fake_a": fake_a, "identity_b": identity_b, "identity_a": identity_a}

    # Section 3

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute eq. 3, with least-squares adversarial losses instead of eq. 1 (Section 4)."""
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
        """Compute the least-squares losses on reals and pooled fakes, halved so that D learns more slowly (Section 7.1)."""
        terms = {}
        for name, network, pool in (("A", self.D_A, self.pool_a), ("B", self.D_B, self.pool_b)):
            fakes = pool.query(batch[f"fake_{name.lower()}"], batch["sample_ids"], self.images_seen)
            real, fake = network(torch.cat([batch[name.lower()], fakes])).chunk(2)
            terms[f"real/{name}"] = lsgan_loss(real, 1) / 2
            terms[f"fake/{name}"] = lsgan_loss(fake, 0) / 2
        return terms


def lsgan_loss(values: Tensor, target: float) -> Tensor:
    """Compute the mean squared distance between a discriminator's output and the target (Section 4)."""
    return (to_float32(values) - target).square().mean()


# Section 7.2


def make_generator(base_channels: int, n_residual_blocks: int) -> nn.Sequential:
    """Create the generator c7s1-64, d128, d256, R256, ..., u128, u64, c7s1-3: (N, 3, H, W) in [-1, 1] to the same."""
    layers: list[nn.Module] = [ReflectionPad2d(3), nn.Conv2d(3, base_channels, 7), *norm_relu(base_channels)]
    for in_channels, out_channels in pairwise((base_channels, 2 * base_channels, 4 * base_channels)):
        layers += [nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), *norm_relu(out_channels)]
    layers += [ResidualBlock(4 * base_channels) for _ in range(n_residual_blocks)]
    for in_channels, out_channels in pairwise((4 * base_channels, 2 * base_channels, base_channels)):
        layers += [
            nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1),
            *norm_relu(out_channels),
        ]
    return nn.Sequential(*layers, ReflectionPad2d(3), nn.Conv2d(base_channels, 3, 7), nn.Tanh())


class ResidualBlock(nn.Module):
    """Residual block Rk: two 3 x 3 convolutions with a skip connection, without ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [[ReflectionPad2d(1), nn.Conv2d(channels, channels, 3)] for _ in range(2)]
        self.block = nn.Sequential(*convs[0], *norm_relu(channels), *convs[1], nn.InstanceNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (N, channels, H, W) to the same shape."""
        return x + self.block(x)


def norm_relu(channels: int) -> list[nn.Module]:
    """Create instance normalization without affine parameters, and ReLU."""
    return [nn.InstanceNorm2d(channels), nn.ReLU()]


def make_discriminator(base_channels: int) -> nn.Sequential:
    """Create the discriminator C64-C128-C256-C512 with a final convolution: one value per patch of 70 x 70 pixels.

    The input is (N, 3, H, W) in [-1, 1]. The last two convolutions have stride 1, as in the authors' code. With stride 2, as in
    the text, patches would be larger.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, base_channels, 4, 2, 1), nn.LeakyReLU(0.2)]
    for in_channels, out_channels, stride in (
        (base_channels, 2 * base_channels, 2),
        (2 * base_channels, 4 * base_channels, 2),
        (4 * base_channels, 8 * base_channels, 1),
    ):
        layers += [nn.Conv2d(in_channels, out_channels, 4, stride, 1), nn.InstanceNorm2d(out_channels), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8 * base_channels, 1, 4, 1, 1))
