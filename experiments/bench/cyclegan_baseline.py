"""The training step of CycleGAN in the order of its authors' code, as a baseline for `darkroom bench`."""

import statistics
from itertools import repeat

from experiments.bench.reference_loop import Step, make_optimizers, make_reference_step
from experiments.bench.timing import Stopwatch, quartiles
from modules.cyclegan import CycleGAN, lsgan_loss
from modules.training.phases import Batch


def ratio_to_classic(method: CycleGAN, batch: Batch) -> dict[str, object]:
    """Return the time of the authors' training step divided by ours, with quartiles."""
    steps = {
        "ours": make_reference_step(method, repeat(batch), make_optimizers(method)),
        "classic": reference_cyclegan_step(method, batch),
    }
    spent: dict[str, list[float]] = {name: [] for name in steps}
    watch = Stopwatch(method.device)
    for i in range(13):  # the first round is a warm-up
        for name, step in steps.items():
            watch.start()
            step()
            step()
            milliseconds = watch.stop()
            if i:
                spent[name].append(milliseconds)
    ratios = [classic / ours for ours, classic in zip(spent["ours"], spent["classic"], strict=True)]
    return {"ratio_to_classic": statistics.median(ratios), "ratio_to_classic_quartiles": quartiles(ratios)}


def reference_cyclegan_step(method: CycleGAN, batch: Batch) -> Step:
    """Return a CycleGAN step with the order of passes of its authors' PyTorch code: one pass per image and network.

    The order is: G(A), F(G(A)), F(B), G(F(B)); G(B) and F(A) for the identity loss; update of the generators; for each
    discriminator a forward pass on real images, a forward pass on fake images and a backward pass; update of both
    discriminators.
    """
    generators, discriminators = make_optimizers(method).values()
    for group in generators.param_groups + discriminators.param_groups:
        group["lr"] = method.learning_rate
    a, b = batch["A"] * 2 - 1, batch["B"] * 2 - 1
    weight, discriminator_networks = method.cycle_weight, [method.D_A, method.D_B]

    def step() -> None:
        fake_b = method.G_AB(a)
        cycle_a = method.G_BA(fake_b)
        fake_a = method.G_BA(b)
        cycle_b = method.G_AB(fake_a)
        for network in discriminator_networks:
            network.requires_grad_(False)
        generators.zero_grad()
        loss = lsgan_loss(method.D_B(fake_b), 1) + lsgan_loss(method.D_A(fake_a), 1)
        loss = loss + weight * ((cycle_a - a).abs().mean() + (cycle_b - b).abs().mean())
        if method.identity_weight:
            identity = (method.G_AB(b) - b).abs().mean() + (method.G_BA(a) - a).abs().mean()
            loss = loss + weight * method.identity_weight * identity
        loss.backward()
        generators.step()
        for network in discriminator_networks:
            network.requires_grad_(True)
        discriminators.zero_grad()
        for network, real, fake in ((method.D_A, a, fake_a), (method.D_B, b, fake_b)):
            ((lsgan_loss(network(real), 1) + lsgan_loss(network(fake.detach()), 0)) / 2).backward()
        discriminators.step()

    return step
