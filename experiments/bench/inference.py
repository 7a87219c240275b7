"""Inference speed for `darkroom bench`: super-resolution, segmentation, sampling, reconstruction and translation."""

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
from experiments.bench.reference_loop import Step, bare_batches, count_flops, make_optimizers, make_reference_step, quartiles
from modules.autoencoder import Autoencoder
from modules.cyclegan import CycleGAN, lsgan_loss
from modules.networks.mlp_conv import to_hw
from modules.srcnn import SRCNN
from modules.tasks.generation import GenerativeMethod
from modules.tasks.segmentation import SegmentationMethod
from modules.training.method import Method
from modules.training.phases import Batch


def bench_inference(method: Method, data: Any) -> dict[str, Any]:
    """Time the inference of a trained network, according to its task."""
    if isinstance(method, GenerativeMethod):
        return bench_sampling(method)
    if isinstance(method, Autoencoder):
        return bench_reconstruction(method)
    if isinstance(method, CycleGAN):
        return bench_translation(method, data)
    return bench_segmentation(method, data) if isinstance(method, SegmentationMethod) else bench_superresolution(method)


def bench_segmentation(method: SegmentationMethod, data: Segmentation) -> dict[str, Any]:
    """Return the megapixels segmented per second on up to five validation images, without test-time augmentation."""
    method.tta_views = 1
    data.setup("validate")
    images = [data.val_images[i]["image"].float() / 255 for i in range(min(5, len(data.val_images)))]
    pixels = sum(image.shape[-1] * image.shape[-2] for image in images)
    times = []
    with torch.no_grad():
        for _ in range(4):  # the first pass is a warm-up
            started = time.perf_counter()
            for image in images:
                method.predict_step({"image": image}, 0)
            times.append(time.perf_counter() - started)
    return {"megapixels_per_second": pixels / statistics.median(times[1:]) / 1e6}


def bench_sampling(method: GenerativeMethod) -> dict[str, Any]:
    """Return the images sampled per second, in batches of 64."""
    latents = method.sample_latents(range(64))
    return {"samples_per_second": 64 / median_seconds(lambda: method.sample(latents))}


def bench_reconstruction(method: Autoencoder) -> dict[str, Any]:
    """Return the images encoded and decoded per second, in batches of 100."""
    images = torch.rand(100, method.hparams["channels"], *to_hw(method.hparams["size"]))
    return {"reconstructions_per_second": len(images) / median_seconds(lambda: method(images))}


def median_seconds(function: Callable[[], Any]) -> float:
    """Return the median duration of five calls without gradients, after one warm-up call."""
    times = []
    with torch.no_grad():
        for _ in range(6):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def bench_superresolution(method: Any) -> dict[str, Any]:
    """Return the mean milliseconds to upscale an image of Set14 (else photographs/test), also for SRCNN 9-5-5."""
    name = "set14"
    try:
        image_refs = list_image_refs(name)
    except DatasetNotFound:
        name = "photographs/test"
        image_refs = list_image_refs(name)
    images = SREvalImages(image_refs, method.scale)
    inputs = [images[i]["input"] for i in range(len(images))]
    networks = (method, SRCNN(method.scale, "9-5-5").eval())
    ours, srcnn = (_milliseconds(network, inputs) for network in networks)
    flops, flops_srcnn = (count_flops(partial(network, inputs[0])) for network in networks)
    return {
        "inference_set": name,
        "inference_ms": ours,
        "inference_ms_srcnn": srcnn,
        "srcnn_to_ours": srcnn / ours,
        "srcnn_to_ours_flops": flops_srcnn / flops,
        "srcnn_to_ours_theory": 2.5 * method.scale**2,  # ESPCN paper, Section 1
    }


def bench_translation(method: CycleGAN, data: Unpaired) -> dict[str, Any]:
    """Return the images translated per second, and the time of the authors' training step divided by ours."""
    batch = next(bare_batches(data, method.device))
    results = {"translations_per_second": len(batch["A"]) / median_seconds(lambda: method.translate(batch["A"], "AtoB"))}
    if not method.adversarial:
        return results
    steps = {
        "ours": make_reference_step(method, repeat(batch), make_optimizers(method)),
        "classic": reference_cyclegan_step(method, batch),
    }
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(13):  # the first round is a warm-up
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            step()
            if i:
                spent[name].append(time.perf_counter() - started)
    ratios = [classic / ours for ours, classic in zip(spent["ours"], spent["classic"], strict=True)]
    return {**results, "ratio_to_classic": statistics.median(ratios), "ratio_to_classic_quartiles": quartiles(ratios)}


def reference_cyclegan_step(method: CycleGAN, batch: Batch) -> Step:
    """Return a CycleGAN step with the order of passes of its authors' PyTorch code: one pass per image and network.

    G(A), F(G(A)), F(B), G(F(B)); G(B) and F(A) for the identity loss; the generators' update; for each discriminator a forward
    pass on real images, one on fakes and a backward pass; the discriminators' update.
    """
    generators, discriminators = make_optimizers(method)
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


def _milliseconds(network: Any, inputs: list[Tensor]) -> float:
    per_image = []
    with torch.no_grad():
        for image in inputs:
            times = []
            for _ in range(4):  # the first call is a warm-up
                started = time.perf_counter()
                network(image)
                times.append(time.perf_counter() - started)
            per_image.append(1000 * statistics.median(times[1:]))
    return statistics.fmean(per_image)
