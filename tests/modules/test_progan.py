"""Progressive growing: layers against the paper and plain torch, the schedule of growth, and the contract."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from datamodules.random.noise import normal
from experiments.bench.timing import count_flops
from experiments.cli.main import main
from modules.losses.adversarial import gradient_penalty
from modules.networks.progressive import (
    Conv,
    Dense,
    Discriminator,
    DownConv,
    Generator,
    LayerNorm,
    Layers,
    MinibatchDiscrimination,
    MinibatchStddev,
    PixelNorm,
    UpConv,
    side_of,
)
from modules.progan import ProGAN
from modules.training.stages import StagePlan
from tests.helpers.method_contract import checkpoint, fit
from tests.helpers.subprocess_helpers import forked
from tests.tasks.generation import GenerativeContract, write_generative_recipe

MODEL = {
    "class_path": "modules.progan.ProGAN",
    "init_args": {
        "size": 32,
        "channels": 1,
        "latent_size": 8,
        "base_channels": 64,
        "max_channels": 8,
        "stable_images": 8,
        "fade_images": 8,
        "batch_sizes": {4: 8},
        "average_half_life": 16,
    },
}


class TestProGAN(GenerativeContract):
    learns_slowly = True
    size = 16  # three levels
    model = {**MODEL, "init_args": {**MODEL["init_args"], "size": size, "base_channels": 128, "max_channels": 16}}
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicProGAN"
    bf16_images = 60  # all stages
    bf16_overrides = ("--model.learning_rate", "1e-4")  # the gradient penalty amplifies rounding from step to step
    bf16_rtol = 0.05  # 0.031 with and without AVX2: mean scores are small
    training_overrides = [
        "--model.total_images",
        "12800",
        "--model.stable_images",
        "1600",
        "--model.fade_images",
        "1600",
        "--model.batch_sizes",
        "{}",
        "--model.average_half_life",
        "1000",
        "--val_every_images",
        "3200",
        "--data.batch_size",
        "16",
    ]

    def test_run_resumes_at_the_change_of_a_stage_and_within_a_fade(self, workdir, recipe, monkeypatch):
        """The layers of 16 x 16 pixels are faded in from image 24 to image 32."""
        assert [stage.start for stage in ProGAN(**self.model["init_args"]).stages()] == [0, 8, 16, 24, 32]
        signals = ["SIGTERM@24@0", "SIGTERM@28@0"]
        self.test_resumed_run_equals_the_uninterrupted_run(workdir, recipe, monkeypatch, signals, 0, 3)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_match_the_authors_code():
    """23.1 million each in the paper; with and without the 1 x 1 layers of smaller sizes."""
    generator, discriminator = Generator(1024, 3, 512, 8192, 512, Layers()), Discriminator(1024, 3, 8192, 512, Layers())
    assert (count(generator), count(discriminator)) == (23_079_115, 23_087_249)
    assert count(generator) - count(generator.to_rgb[:-1]) == 23_071_507
    assert count(discriminator) - count(discriminator.from_rgb[:-1]) == 23_077_137
    widths = [layer.weight.shape[1] for layer in generator.to_rgb]
    assert widths == [512, 512, 512, 512, 256, 128, 64, 32, 16]  # Table 2


def test_fused_convolutions_equal_their_parts():
    maps = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    up, down = UpConv(3, 5, 3, True).double(), DownConv(3, 5, 3, True).double()
    for layer in (up, down):
        nn.init.normal_(layer.bias)
    weight = up.weight * math.sqrt(2 / 27)  # equalized learning rate: He's constant at run time
    assert torch.allclose(up(maps), F.conv2d(F.interpolate(maps, scale_factor=2), weight, up.bias, padding=1))
    weight = down.weight * math.sqrt(2 / 27)
    assert torch.allclose(down(maps), F.avg_pool2d(F.conv2d(maps, weight, down.bias, padding=1), 2))


@pytest.mark.parametrize("equalized_lr", [True, False])
def test_layers_preserve_the_variance_at_the_start(equalized_lr):
    torch.manual_seed(0)
    features = torch.randn(64, 256)
    layer = Dense(256, 512, equalized_lr)
    assert layer(features).var().item() == pytest.approx(2, rel=0.05)  # He: a ReLU halves it
    assert layer.weight.std().item() == pytest.approx(1 if equalized_lr else math.sqrt(2 / 256), rel=0.05)


def test_normalization_matches_definitions():
    maps = torch.randn(4, 6, 3, 5, dtype=torch.float64)
    assert torch.allclose(PixelNorm()(maps).square().mean(1), torch.ones(4, 3, 5).double())
    assert torch.allclose(PixelNorm()(maps), maps / maps.square().mean(1, keepdim=True).sqrt())
    layer = LayerNorm(6).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    mean, std = maps.mean((1, 2, 3), keepdim=True), maps.std((1, 2, 3), keepdim=True, correction=0)
    expected = (maps - mean) / std * layer.weight + layer.bias[:, None, None]
    assert torch.allclose(layer(maps), expected, atol=1e-3)
    features = maps[:, :, 0, 0]
    mean, std = features.mean(1, keepdim=True), features.std(1, keepdim=True, correction=0)
    assert torch.allclose(layer(features), (features - mean) / std * layer.weight + layer.bias, atol=1e-3)


@pytest.mark.parametrize("group_size", [None, 2])
def test_minibatch_stddev_is_that_of_the_group(group_size):
    maps = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    output = MinibatchStddev(group_size)(maps)
    assert torch.equal(output[:, :3], maps)
    for i in range(4):
        group = maps if group_size is None else maps[i // 2 * 2 : i // 2 * 2 + 2]
        expected = group.numpy().std(0).mean()
        assert output[i, 3].flatten().tolist() == pytest.approx([expected] * 25)


def test_minibatch_discrimination_matches_a_loop():
    """Rows of unit length, times exp(log_scale); the bias is -1 at the start."""
    layer, features = MinibatchDiscrimination(3, kernels=4, kernel_size=2).double(), torch.randn(3, 3).double()
    nn.init.normal_(layer.log_scale)
    output = layer(features)
    assert torch.equal(output[:, :3], features)
    for kernel in range(4):
        rows = [
            row / row.norm() * scale.exp() for row, scale in zip(layer.weight[kernel], layer.log_scale[kernel], strict=True)
        ]
        projections = [[(row @ item).item() for row in rows] for item in features]
        for i in range(3):
            others = [projections[j] for j in range(3) if j != i]
            distances = [sum(abs(a - b) for a, b in zip(projections[i], other, strict=True)) for other in others]
            assert output[i, 3 + kernel].item() == pytest.approx(sum(math.exp(-distance) for distance in distances) - 1)


@pytest.mark.parametrize("normalization", ["pixel", "batch", "none"])
@pytest.mark.parametrize("minibatch", ["stddev", "discrimination", "none"])
def test_fade_blends_the_old_and_the_new_output(normalization, minibatch):
    """Both networks are continuous where a fade starts and ends, and in between, images are linear in the weight."""
    layers = Layers(normalization=normalization, minibatch=minibatch)
    generator = Generator(16, 3, 8, 64, 8, layers).double().eval()
    discriminator = Discriminator(16, 3, 64, 8, layers).double().eval()
    latents = torch.randn(4, 8).double()
    images = {level: generator(latents, level) for level in (0, 1e-9, 0.25, 1 - 1e-9, 1, 1.5, 2)}
    assert {level: image.shape[-1] for level, image in images.items()} == {level: side_of(level) for level in images}
    small = F.interpolate(images[0], scale_factor=2)
    assert torch.allclose(images[1e-9], small, atol=1e-6)
    assert torch.allclose(images[1 - 1e-9], images[1], atol=1e-6)
    inverse = torch.atanh if normalization == "batch" else torch.clone  # tanh is applied to the blended images
    assert torch.allclose(inverse(images[0.25]), 0.75 * inverse(small) + 0.25 * inverse(images[1]))
    assert torch.allclose(discriminator(small, 1e-9), discriminator(images[0], 0), atol=1e-6)
    assert torch.allclose(discriminator(images[1], 1 - 1e-9), discriminator(images[1], 1), atol=1e-6)


def test_growth_follows_the_schedule():
    method = ProGAN(32, 3, 8, 64, 8, stable_images=100, fade_images=50, batch_sizes={8: 10}, total_images=1_000)
    assert [method.level_at(seen) for seen in (0, 99, 100, 124, 149, 150, 249, 250, 299, 300, 449, 450, 999)] == [
        *(0, 0, 0.02, 0.5, 1),
        *(1, 1, 1.02, 2, 2),
        *(3, 3, 3),
    ]
    plan = StagePlan(method.stages(), 16)
    for seen in range(0, 1_000, 1):
        if plan.starts[plan.index(seen)] == seen or seen in plan.starts:
            assert plan.image_size(seen) == side_of(method.level_at(seen))
    position = 0
    while position < 1_000:
        assert plan.image_size(position) == side_of(method.level_at(position))
        assert plan.batch_size(position) == (10 if plan.image_size(position) == 8 else 16)
        position += plan.batch_size(position)
    assert [stage.reset_optimizers for stage in method.stages()] == [False] + [True] * 6


def test_learning_rate_depends_on_the_side_and_rises_at_the_start():
    options = {"stable_images": 100, "fade_images": 50, "total_images": 1_000, "rampup_images": 10}
    method = ProGAN(8, 3, 8, 64, 8, **options, learning_rate=0.5, learning_rates={8: 1.0})
    rates = [method.schedule(seen) for seen in (0, 5, 10, 50, 99, 100, 104, 120, 150, 160)]
    assert rates == pytest.approx([0.5 * math.exp(-5), 0.5 * math.exp(-5 / 4), *[0.5] * 3, *[1.0] * 5])


def test_statistics_of_batch_normalization_are_those_of_the_averaged_weights():
    """In training mode, a batch of the same latents has the outputs of the evaluation mode."""
    model = {**MODEL["init_args"], "normalization": "batch", "minibatch": "none", "total_images": 60}
    torch.manual_seed(0)
    method = ProGAN(**model).double().eval()
    method.level = 1.5
    for parameter in method.average.network.parameters():
        nn.init.normal_(parameter)
    method.compute_statistics()
    assert not method.average.network.training
    latents = torch.from_numpy(normal(0, "statistics", range(128), 8))
    samples = method.average.network(latents, 1.5)
    expected = method.average.network.train()(latents, 1.5)
    assert (samples - expected).abs().mean() < 0.1 * expected.std()


def test_penalty_with_a_target_matches_a_closed_form():
    """The gradient of a linear critic is its weight, with norm 3."""
    weight = torch.tensor([[1.0, 2.0, 2.0]]).double()
    real, fake = torch.randn(2, 5, 3).double()
    for target in (1.0, 750.0):
        penalty = gradient_penalty(lambda x: x @ weight.T, real, fake, torch.rand(5, 1).double(), target)
        assert penalty.item() == pytest.approx((3 - target) ** 2 / target**2)


def test_samples_are_those_of_the_average_at_the_level_of_the_weights():
    method = ProGAN(**{**MODEL["init_args"], "total_images": 60}).eval()
    latents = method.sample_latents(range(2))
    method.average.network.to_rgb[1].bias.data.fill_(0.5)  # of 8 x 8 pixels
    for seen, side in ((0, 4), (8, 8), (20, 8), (59, 32)):
        method.load_state_dict({**method.state_dict(), "images_trained": torch.tensor(seen)})
        images = method.sample(latents)
        assert images.shape == (2, 1, 32, 32)
        assert 0 <= images.min() <= images.max() <= 1
        small = images[..., :: 32 // side, :: 32 // side]
        assert torch.equal(images, F.interpolate(small, (32, 32)))


def test_committed_weights_contain_the_average_and_the_level(workdir):
    """A method with these weights generates the images of the trained one."""
    model = {**MODEL, "init_args": {**MODEL["init_args"], "total_images": 60}}
    recipe = write_generative_recipe(workdir / "tiny.yaml", model, size=32)
    assert forked(fit, recipe, "--run", "r") == 0
    state = checkpoint(workdir, recipe, "r")["state_dict"]
    used = {name: value for name, value in state.items() if not name.startswith(("generator.", "discriminator."))}
    assert int(used["images_trained"]) == 56
    method = ProGAN(**model["init_args"])
    method.load_state_dict(used, strict=False)
    assert method.level == 3


def test_growth_command_shows_the_last_samples_of_each_stage(workdir, capfd):
    model = {**MODEL, "init_args": {**MODEL["init_args"], "total_images": 60, "batch_sizes": None}}
    recipe = write_generative_recipe(workdir / "tiny.yaml", model, size=32, val_samples=5)
    assert forked(fit, recipe, "--run", "r", "--val_every_images", "8") == 0
    assert forked(main, ["growth", str(recipe), "--count", "3"]) == 0
    output = capfd.readouterr().out
    assert [line.split()[2] for line in output.splitlines() if line.startswith("column")] == [
        "4",
        "8",
        "8",
        "16",
        "16",
        "32",
        "32",
    ]
    picture = np.asarray(Image.open(workdir / "growth.png").convert("L"))
    assert picture.shape == (3 * 66 + 2, 7 * 66 + 2)
    for column, images in enumerate((8, 16, 24, 32, 40, 48, 60)):
        preview = np.asarray(Image.open(workdir / f"runs/tiny/r/samples/{images:09d}.png").convert("L"))
        cell = picture[68 : 68 + 64, 2 + 66 * column : 66 + 66 * column]  # of the second latent
        assert (cell[::2, ::2] == preview[2:34, 36:68]).all()
    for argv, reason in (
        (["growth", str(recipe), "--count", "9"], "growth: --count 9: the run has 5 samples"),
        (["growth", str(recipe), "--run", "other"], "tiny has r"),
        (["growth", str(recipe), "--output", "growth.jpg"], "--output: growth.jpg must end in .png"),
    ):
        assert forked(main, argv) == 2
        assert reason in capfd.readouterr().err


def test_bench_times_the_last_stage_and_compares_all_stages(workdir, capfd):
    model = {**MODEL, "init_args": {**MODEL["init_args"], "total_images": 60}}
    recipe = write_generative_recipe(workdir / "tiny.yaml", model, size=32)
    growth = ["--model.stable_images", "40", "--model.fade_images", "40", "--model.total_images", "320"]
    options = ["--pairs", "6", "--steps", "2", "--json", *growth]
    assert forked(main, ["bench", str(recipe), *options]) == 0
    results = json.loads(capfd.readouterr().out)
    assert results["ratio_to_bare"] > 0
    stages = results["stages"]
    assert [(row["start"], row["images"], row["side"], row["batch_size"]) for row in stages] == [
        *((0, 40, 4, 8), (40, 40, 8, 4), (80, 40, 8, 4)),
        *((120, 40, 16, 4), (160, 40, 16, 4), (200, 40, 32, 4), (240, 80, 32, 4)),
    ]
    assert all(row["ms_per_image"] > 0 for row in stages)
    # During a fade, the 1 x 1 layers of the smaller images run as well.
    assert 1 < stages[1]["mflop_per_image"] / stages[2]["mflop_per_image"] < 1.1
    # The rate is that of the last stage.
    expected = results["images_per_second"] * stages[-1]["mflop_per_image"] / 1000
    assert results["gflops"] == pytest.approx(expected, rel=1e-3)


def test_operations_of_a_gradient_penalty_are_counted():
    """A linear critic of 8 features: forward and input gradient, each 2 x 16 x 8 operations; then their gradients."""
    weight, points = torch.randn(1, 8, requires_grad=True), torch.randn(16, 8)

    def step():
        penalty = gradient_penalty(lambda x: F.linear(x, weight), points, points + 1, torch.rand(16, 1))
        penalty.backward()

    assert count_flops(step) == 3 * 2 * 16 * 8  # forward; gradient of the input; its gradient of the weight


@pytest.mark.slow
def test_compiled_blocks_train_as_uncompiled_ones(workdir):
    """The growth changes the graph of the generator more often than torch.compile recompiles one function."""
    model = {
        "class_path": "tests.helpers.deterministic_variants.DeterministicProGAN",
        "init_args": {**MODEL["init_args"], "total_images": 60},
    }
    recipe = write_generative_recipe(workdir / "tiny.yaml", model, size=32)
    for run, compiled in (("plain", "false"), ("compiled", "true")):
        assert forked(fit, recipe, "--run", run, "--compile", compiled, "--trainer.precision", "64-true") == 0
    plain, compiled = (checkpoint(workdir, recipe, run)["state_dict"] for run in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name in plain:
        assert torch.allclose(plain[name].double(), compiled[name].double(), rtol=0, atol=1e-8), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model.size", "48", "--data.size", "48"], "model.size: 48 is not valid. Use 4, 8, 16, 32"),
        (["--model.total_images", "40"], "model.total_images: the stage of 32 x 32 pixels starts after 48 images"),
        (["--model.batch_sizes", "{64: 4}"], "model.batch_sizes: 64 is not a side of model.size 32. Use 4, 8, 16, 32"),
        (["--model.base_channels", "8"], "model.base_channels: 8 is too small for model.size 32. Use at least 16"),
        (["--data.size", "64", "--model.size", "32"], "model.size: 32 differs from data.size: 64"),
        (["--model.channels", "3", "--data.channels", "1"], "model.channels: 3 differs from data.channels: 1"),
        (["--data.batch_size", "3", "--trainer.devices", "2"], "data.batch_size"),
        (
            ["--model.minibatch_group", "3"],
            "model.minibatch_group: the standard deviation cannot be computed over groups of 3 of",
        ),
        (
            ["--accumulate_grad_batches", "4"],
            "groups of 1 of the 1 samples on a device and in a micro-batch (4 parts of a batch",
        ),
        (["--model.batch_sizes", "{4: 6}", "--accumulate_grad_batches", "4"], "model.batch_sizes or data.batch_size: 6 is not"),
        (
            ["--model.grow", "false", "--model.batch_sizes", "{8: 4}"],
            "model.batch_sizes: 8 is not a side of model.size 32. Use 32",
        ),
        (["--data.crop", "16"], "data.crop: 16 is less than data.size: 32"),
    ],
)
def test_unusable_settings_are_one_line_before_training(workdir, capfd, options, reason):
    model = {**MODEL, "init_args": {**MODEL["init_args"], "total_images": 60}}
    recipe = write_generative_recipe(workdir / "tiny.yaml", model, size=32)
    assert forked(main, ["fit", str(recipe), *options]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert reason in error


def test_equalized_weights_are_scaled_by_hes_constant():
    assert Conv(3, 5, 1, True, gain=1.0).scale == pytest.approx(1 / math.sqrt(3))
    assert Conv(3, 5, 3, False).scale == 1
