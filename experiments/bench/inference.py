"""What a trained network's work costs, for `darkroom bench`: enlarging, segmenting, sampling, translating."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from datamodules.catalog.catalog import DatasetNotFound
from datamodules.io.image_refs import list_image_refs
from datamodules.segmentation import Segmentation
from datamodules.superresolution_datasets import SREvalImages
from datamodules.unpaired import Unpaired
from experiments.bench.reference_loop import Step, bare_batches, flops_of, loop, optimizers_of, quartiles
from modules.autoencoder import Autoencoder
from modules.cyclegan import CycleGAN, lsgan_loss
from modules.networks.mlp_conv import to_hw
from modules.srcnn import SRCNN
from modules.tasks.generation import GenerativeMethod
from modules.tasks.segmentation import SegmentationMethod
from modules.training.method import Method
from modules.training.phases import Batch


def use_figures(method: Method, data: Any) -> dict[str, Any]:
    """What the trained network's work costs, by its kind."""
    if isinstance(method, GenerativeMethod):
        return sampling_figures(method)
    if isinstance(method, Autoencoder):
        return coding_figures(method)
    if isinstance(method, CycleGAN):
        return translation_figures(method, data)
    return segmentation_figures(method, data) if isinstance(method, SegmentationMethod) else inference_figures(method)


def segmentation_figures(method: SegmentationMethod, data: Segmentation) -> dict[str, Any]:
    """Millions of pixels segmented a second, over the pictures that choose the checkpoint, in one view each."""
    method.tta_views = 1
    data.setup("validate")
    pictures = [data.val_pictures[i]["image"].float() / 255 for i in range(min(5, len(data.val_pictures)))]
    pixels = sum(picture.shape[-1] * picture.shape[-2] for picture in pictures)
    times = []
    with torch.no_grad():
        for _ in range(4):  # the first one warms up
            started = time.perf_counter()
            for picture in pictures:
                method.predict_step({"image": picture}, 0)
            times.append(time.perf_counter() - started)
    return {"megapixels_per_second": pixels / statistics.median(times[1:]) / 1e6}


def sampling_figures(method: GenerativeMethod) -> dict[str, Any]:
    """Images made a second, 64 at once."""
    latents = method.sample_latents(range(64))
    return {"samples_per_second": 64 / seconds(lambda: method.sample(latents))}


def coding_figures(method: Autoencoder) -> dict[str, Any]:
    """Images that go there and back a second, 100 at once."""
    images = torch.rand(100, method.hparams["channels"], *to_hw(method.hparams["size"]))
    return {"reconstructions_per_second": len(images) / seconds(lambda: method(images))}


def seconds(work: Callable[[], Any]) -> float:
    """What it takes without gradients, median of five times, after one to warm up."""
    times = []
    with torch.no_grad():
        for _ in range(6):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def inference_figures(method: Any) -> dict[str, Any]:
    """Milliseconds to enlarge a picture, mean over Set14 (else the embedded test photographs), and SRCNN 9-5-5 beside it."""
    name = "set14"
    try:
        found = list_image_refs(name)
    except DatasetNotFound:
        name = "photographs/test"
        found = list_image_refs(name)
    pictures = SREvalImages(found, method.scale)
    lows = [pictures[i]["input"] for i in range(len(pictures))]
    networks = (method, SRCNN(method.scale, "9-5-5").eval())
    ours, srcnn = (_milliseconds(network, lows) for network in networks)
    flops, flops_srcnn = (flops_of(partial(network, lows[0])) for network in networks)
    return {
        "inference_set": name,
        "inference_ms": ours,
        "inference_ms_srcnn": srcnn,
        "srcnn_to_ours": srcnn / ours,
        "srcnn_to_ours_flops": flops_srcnn / flops,
        "srcnn_to_ours_theory": 2.5 * method.scale**2,  # ESPCN paper, Section 1
    }


def translation_figures(method: CycleGAN, data: Unpaired) -> dict[str, Any]:
    """Pictures translated a second, and the time of a step in the order of passes of the classic code beside ours."""
    batch = next(bare_batches(data, method.device))
    figures = {"translations_per_second": len(batch["A"]) / seconds(lambda: method.translate(batch["A"], "AtoB"))}
    if not method.adversarial:
        return figures
    steps = {"ours": loop(method, repeat(batch), optimizers_of(method)), "classic": classic_step(method, batch)}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for pair in range(13):  # the first one warms up
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            step()
            if pair:
                spent[name].append(time.perf_counter() - started)
    ratios = [classic / ours for ours, classic in zip(spent["ours"], spent["classic"], strict=True)]
    return {**figures, "ratio_to_classic": statistics.median(ratios), "ratio_to_classic_quartiles": quartiles(ratios)}


def classic_step(method: CycleGAN, batch: Batch) -> Step:
    """A step of CycleGAN in the order of passes of its authors' PyTorch code: every picture and every network by itself.

    G(A), F(G(A)), F(B), G(F(B)); G(B) and F(A) for the identity loss; the generators' step; each discriminator on reals, then
    on fakes, with a backward pass of its own; the discriminators' step.
    """
    generators, discriminators = optimizers_of(method)
    for group in generators.param_groups + discriminators.param_groups:
        group["lr"] = method.learning_rate
    a, b = batch["A"] * 2 - 1, batch["B"] * 2 - 1
    weight, judges = method.cycle_weight, [method.D_A, method.D_B]

    def step() -> None:
        fake_b = method.G_AB(a)
        back_a = method.G_BA(fake_b)
        fake_a = method.G_BA(b)
        back_b = method.G_AB(fake_a)
        for judge in judges:
            judge.requires_grad_(False)
        generators.zero_grad()
        loss = lsgan_loss(method.D_B(fake_b), 1) + lsgan_loss(method.D_A(fake_a), 1)
        loss = loss + weight * ((back_a - a).abs().mean() + (back_b - b).abs().mean())
        if method.identity_weight:
            same = (method.G_AB(b) - b).abs().mean() + (method.G_BA(a) - a).abs().mean()
            loss = loss + weight * method.identity_weight * same
        loss.backward()
        generators.step()
        for judge in judges:
            judge.requires_grad_(True)
        discriminators.zero_grad()
        for judge, real, fake in ((method.D_A, a, fake_a), (method.D_B, b, fake_b)):
            ((lsgan_loss(judge(real), 1) + lsgan_loss(judge(fake.detach()), 0)) / 2).backward()
        discriminators.step()

    return step


def _milliseconds(network: Any, lows: list[Tensor]) -> float:
    per_picture = []
    with torch.no_grad():
        for low in lows:
            times = []
            for _ in range(4):  # the first one warms up
                started = time.perf_counter()
                network(low)
                times.append(time.perf_counter() - started)
            per_picture.append(1000 * statistics.median(times[1:]))
    return statistics.fmean(per_picture)
