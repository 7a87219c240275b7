"""CycleGAN: translation between two sets of pictures of which no two belong together.

J.-Y. Zhu, T. Park, P. Isola, A. A. Efros. Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks.
ICCV 2017. arXiv:1703.10593.

What we do differently, and why:

1. The paper's F, from B to A, is called `b_to_a` here, and its G `a_to_b`.
2. The learning rate falls with every image in the second half of the training, not once an epoch: sets of different sizes
   have no common epoch.
3. The identity loss (Section 5.2, for paintings into photographs; also for the flowers) is an explicit choice; the common
   PyTorch code has it on for every task.
4. One pool for all processes, see `modules.training.image_pool`; with a batch of one it is the authors'.
5. Label maps are made smaller by what is nearest, not blended; what has no class is black.
6. What is left away in the ablations of Section 5.1.4 is not computed: without an adversarial loss there are no discriminators.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from datamodules.errors import Refused
from modules.losses.precision import to_float32
from modules.networks.init import dcgan_init_
from modules.tasks.translation import Direction, TranslationMethod
from modules.training.image_pool import Pool
from modules.training.method import Batch
from modules.training.phases import Phase

Objective = Literal["full", "cycle", "gan", "gan-cycle-A", "gan-cycle-B"]
CYCLES = {"full": "AB", "cycle": "AB", "gan": "", "gan-cycle-A": "A", "gan-cycle-B": "B"}  # the domains that come back
SMALLEST = 24  # pixels: a discriminator's last maps must not be empty


class CycleGAN(TranslationMethod):
    """Section 3: two generators, two discriminators, and the pictures must come back as they were.

    Args:
        crop: side of a training picture in pixels.
        blocks: residual ones in a generator; the paper has 6 for 128 pixels, 9 from 256 on.
        width: channels of the first layer of every network.
        objective: "full", or an ablation: "cycle" alone, "gan" alone, or with one cycle, "gan-cycle-A" (A to B to A) or
            "gan-cycle-B"; what the paper calls forward begins with its x, which in its ablation are the label maps.
        cycle_weight: lambda of eq. 3.
        identity_weight: of the identity loss, as a share of `cycle_weight`: 0 for none, 0.5 in the paper where it is used.
        pool: how many earlier fakes of each domain the discriminators see again.
        images: training budget, in pairs of one picture of A and one of B.
        learning_rate: of Adam; constant, then falling to zero along a line in the second half.
        seed: of what is taken from the pools.
    """

    training_state = ("pool_a", "pool_b")

    def __init__(
        self,
        crop: int = 256,
        blocks: int = 9,
        width: int = 64,
        objective: Objective = "full",
        cycle_weight: NonNegativeFloat = 10.0,
        identity_weight: NonNegativeFloat = 0.0,
        pool: int = 50,
        images: int = 200_000,
        learning_rate: PositiveFloat = 2e-4,
        seed: int = 0,
    ) -> None:
        super().__init__(images, learning_rate, seed=seed)
        self.save_hyperparameters()
        if objective not in CYCLES:
            raise Refused(f"model.objective: {objective}; take {', '.join(CYCLES)}")
        if crop % self.grid or crop < SMALLEST:
            raise Refused(f"model.crop: {crop} is not a multiple of {self.grid} from {SMALLEST} on")
        for name, value, least in (("width", width, 1), ("blocks", blocks, 0), ("pool", pool, 0)):
            if value < least:
                raise Refused(f"model.{name}: {value} is less than {least}")
        self.cycles = CYCLES[objective]
        self.cycle_weight, self.identity_weight = cycle_weight, identity_weight
        self.a_to_b, self.b_to_a = (generator(width, blocks) for _ in "AB")
        self.adversarial = objective != "cycle"
        if self.adversarial:
            self.of_a, self.of_b = (discriminator(width) for _ in "AB")
            self.pool_a, self.pool_b = (Pool(pool, (3, crop, crop), f"pool/{name}", seed) for name in "AB")
        dcgan_init_(self)
        for name, values in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(values)

    def forward(self, image: Tensor, direction: Direction = "AtoB") -> Tensor:
        """A picture of the other domain: (N, 3, H, W) in [0, 1], H and W multiples of 4, to the same."""
        translate = self.a_to_b if direction == "AtoB" else self.b_to_a
        return (to_float32(translate(image * 2 - 1)) + 1) / 2

    # Section 4, "Training details"

    def phases(self) -> list[Phase]:
        """G and F together, then both discriminators."""
        made = [Phase("generators", [self.a_to_b, self.b_to_a], self.adam, self.generator_losses, self.constant_then_linear)]
        if self.adversarial:
            judges = [self.of_a, self.of_b]
            made.append(Phase("discriminators", judges, self.adam, self.discriminator_losses, self.constant_then_linear))
        return made

    def adam(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Section 7.1; its beta of 0.5 is the code's."""
        return torch.optim.Adam(parameters, betas=(0.5, 0.999), fused=True)

    def constant_then_linear(self, images_seen: int) -> dict[str, float]:
        """Section 7.1: the same for the first half, then down to zero."""
        return {"lr": self.learning_rate * min(1.0, 2 - 2 * images_seen / self.images)}

    def shared(self, batch: Batch) -> Batch:
        """The pictures in [-1, 1] and their translations, which both phases see.

        A generator sees what it translates and, for the identity loss, its own domain in one pass: instance normalisation
        looks at each picture by itself.
        """
        a, b = batch["A"] * 2 - 1, batch["B"] * 2 - 1
        if not self.identity_weight:
            return {"a": a, "b": b, "fake_b": self.a_to_b(a), "fake_a": self.b_to_a(b)}
        fake_b, same_b = self.a_to_b(torch.cat([a, b])).chunk(2)
        fake_a, same_a = self.b_to_a(torch.cat([b, a])).chunk(2)
        return {"a": a, "b": b, "fake_b": fake_b, "fake_a": fake_a, "same_b": same_b, "same_a": same_a}

    # Section 3

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 3; the adversarial part is a least-squares loss instead of eq. 1 (Section 4)."""
        terms = {}
        if self.adversarial:
            terms["adversarial/B"] = squared(self.of_b(batch["fake_b"]), 1)
            terms["adversarial/A"] = squared(self.of_a(batch["fake_a"]), 1)
        if "A" in self.cycles:  # eq. 2: x -> G(x) -> F(G(x))
            terms["cycle/A"] = self.cycle_weight * F.l1_loss(to_float32(self.b_to_a(batch["fake_b"])), batch["a"])
        if "B" in self.cycles:
            terms["cycle/B"] = self.cycle_weight * F.l1_loss(to_float32(self.a_to_b(batch["fake_a"])), batch["b"])
        if self.identity_weight:  # Section 5.2
            weight = self.identity_weight * self.cycle_weight
            terms["identity/A"] = weight * F.l1_loss(to_float32(batch["same_a"]), batch["a"])
            terms["identity/B"] = weight * F.l1_loss(to_float32(batch["same_b"]), batch["b"])
        return terms

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Reals against what the pools give, halved so that D learns more slowly (Section 7.1)."""
        terms = {}
        for name, judge, pool in (("A", self.of_a, self.pool_a), ("B", self.of_b, self.pool_b)):
            fakes = pool.exchanged(batch[f"fake_{name.lower()}"], batch["positions"], self.images_seen)
            real, fake = judge(torch.cat([batch[name.lower()], fakes])).chunk(2)
            terms[f"real/{name}"] = squared(real, 1) / 2
            terms[f"fake/{name}"] = squared(fake, 0) / 2
        return terms


def squared(values: Tensor, aim: float) -> Tensor:
    """Mean squared distance of a discriminator's values from what they are to be."""
    return (to_float32(values) - aim).square().mean()


# Section 7.2


def generator(width: int, blocks: int) -> nn.Sequential:
    """c7s1-64, d128, d256, R256 ..., u128, u64, c7s1-3: pictures in [-1, 1] to pictures in [-1, 1]."""
    layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), *normalised(width)]
    for into, out in pairwise((width, 2 * width, 4 * width)):
        layers += [nn.Conv2d(into, out, 3, stride=2, padding=1), *normalised(out)]
    layers += [Residual(4 * width) for _ in range(blocks)]
    for into, out in pairwise((4 * width, 2 * width, width)):
        layers += [nn.ConvTranspose2d(into, out, 3, stride=2, padding=1, output_padding=1), *normalised(out)]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())


class Residual(nn.Module):
    """Rk: two 3 x 3 convolutions beside a way around them; no ReLU behind the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        padded = [[nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3)] for _ in range(2)]
        self.change = nn.Sequential(*padded[0], *normalised(channels), *padded[1], nn.InstanceNorm2d(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, H, W) to the same."""
        return maps + self.change(maps)


def normalised(channels: int) -> list[nn.Module]:
    """Instance normalisation without learned gains, and ReLU."""
    return [nn.InstanceNorm2d(channels), nn.ReLU()]


def discriminator(width: int) -> nn.Sequential:
    """C64-C128-C256-C512 and one more convolution: a value for each patch of 70 x 70 pixels.

    The last two have a stride of 1, as in the authors' code; with the text's 2 the patches would be larger.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for into, out, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)):
        layers += [nn.Conv2d(into, out, 4, stride, 1), nn.InstanceNorm2d(out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
