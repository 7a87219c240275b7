"""The training step of all methods: phases, gradients, and errors."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from callbacks.run.csv_logger import read_metrics_csv
from experiments.cli.main import main
from modules.losses.adversarial import bce_fake, bce_real, gradient_penalty
from modules.training import gradients
from modules.training.ema import EMA
from modules.training.phases import BoundPhase, Phase, bind_phases, expect_dict, split_micro_batches, train_only
from tests.helpers.gpu_contract import DEVICE
from tests.helpers.method_contract import checkpoint, fit
from tests.helpers.subprocess_helpers import forked
from tests.helpers.wgan_gp import WGANGP
from tests.tasks.generation import GenerativeContract, write_generative_recipe


class TestWGANGP(GenerativeContract):
    learns_slowly = True
    model = {"class_path": "tests.helpers.wgan_gp.WGANGP", "init_args": {}}
    deterministic_model = "tests.helpers.wgan_gp.WGANGP"
    # FID of the last validation; 8 seeds, AVX-512: 0.39 ... 0.57; 4 seeds, AVX2: 0.47 ... 0.51
    training_overrides = [
        "--model.total_images",
        "12800",
        "--val_every_images",
        "3200",
        "--data.batch_size",
        "16",
        "--model.learning_rate",
        "3e-2",
    ]


def bound_phases(method):
    return bind_phases(method.phases(), method.make_optimizers())


def test_train_only_restores_requires_grad_on_error():
    critic, generator = bound_phases(WGANGP())
    with pytest.raises(RuntimeError, match="in the middle"), train_only([generator], [critic, generator]):
        assert not any(p.requires_grad for p in critic.parameters)
        assert all(p.requires_grad for p in generator.parameters)
        raise RuntimeError("in the middle")
    assert all(p.requires_grad for p in critic.parameters + generator.parameters)


def test_ema_weights_belong_to_no_phase():
    method = WGANGP()
    trained = {id(p) for bound in bound_phases(method) for p in bound.parameters}
    assert not any(id(p) in trained or p.requires_grad for p in method.average.parameters())


def test_ema_half_life_is_in_images():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average = EMA(network, half_life=100)
    nn.init.ones_(network.weight)
    for _ in range(10):
        average.update(images=10)
    assert average.network.weight.item() == pytest.approx(0.5)
    assert list(average.state_dict()) == ["network.weight"]


def test_split_micro_batches_adds_sample_ids():
    batch = {"image": torch.arange(6.0).view(6, 1), "label": torch.arange(6)}
    first, second = split_micro_batches(batch, 2, first_id=106)
    assert first["sample_ids"] == range(106, 109)
    assert second["sample_ids"] == range(109, 112)
    assert second["label"].tolist() == [3, 4, 5]


def trainer(scaler=None):
    return SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))


def no_losses(batch):
    return {}


def test_max_grad_norm_applies_to_unscaled_gradients():
    layer = nn.Linear(3, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    fp16 = trainer(torch.amp.GradScaler("cpu", init_scale=1024.0))
    gradients.backward(fp16, layer(torch.tensor([[30.0, 40.0, 0.0]])).sum())
    gradients.optimizer_step(fp16, BoundPhase(Phase("", no_losses, max_grad_norm=0.01), optimizer))
    update = before - layer.weight.detach()
    assert update.norm().item() == pytest.approx(0.01, rel=1e-4)
    assert update[0, 0] / update[0, 1] == pytest.approx(0.75, rel=1e-4)


def test_scaled_loss_gives_the_unscaled_update():
    weight = nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    fp16 = trainer(torch.amp.GradScaler("cpu", init_scale=1024.0))
    gradients.backward(fp16, (weight**2).sum())
    gradients.optimizer_step(fp16, BoundPhase(Phase("", no_losses), optimizer))
    assert weight.tolist() == [0.0, 0.0]  # w - 0.5 * 2 w


@pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=pytest.mark.gpu, id="gpu")])
def test_overflow_skips_only_the_update_of_its_phase(device):
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    fp16 = trainer(scaler)
    layers = [nn.Linear(1, 1, bias=False, device=device) for _ in range(2)]
    before = [layer.weight.item() for layer in layers]
    for layer, size in zip(layers, (float("inf"), 1.0), strict=True):
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        gradients.backward(fp16, layer(torch.ones(1, 1, device=device)).sum() * size)
        gradients.optimizer_step(fp16, BoundPhase(Phase("", no_losses), optimizer))
        gradients.update_grad_scaler(fp16)
    assert scaler.get_scale() == 512
    assert layers[0].weight.item() == before[0]
    assert layers[1].weight.item() == pytest.approx(before[1] - 1)


def test_adversarial_losses_match_binary_cross_entropy():
    logits = torch.tensor([-3.0, 0.5, 60.0])
    entropy = nn.functional.binary_cross_entropy_with_logits
    assert bce_real(logits).item() == pytest.approx(entropy(logits, torch.ones(3)).item())
    assert bce_fake(logits).item() == pytest.approx(entropy(logits, torch.zeros(3)).item())


def test_adversarial_losses_are_computed_in_at_least_float32():
    """float64 is kept; bf16 is cast to float32."""
    logits = torch.tensor([0.1, -3.0, 40.0], dtype=torch.float64)
    assert bce_fake(logits).item() == pytest.approx(logits.exp().log1p().mean().item(), rel=1e-14)
    assert bce_fake(logits.bfloat16()) == bce_fake(logits.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_penalty_of_a_linear_critic_ignores_autocast(dtype):
    critic = nn.Linear(4, 1)
    real, fake, alpha = torch.rand(5, 4), torch.rand(5, 4), torch.rand(5, 1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        penalty = gradient_penalty(critic, real, fake, alpha)
        gradients.backward(trainer(), penalty)
    norm = critic.weight.detach().norm()
    assert penalty.item() == pytest.approx((norm.item() - 1) ** 2, rel=1e-5)
    assert torch.allclose(critic.weight.grad, 2 * (norm - 1) * critic.weight.detach() / norm, atol=1e-6)


class Breaks(WGANGP):
    """The generator loss is NaN after 40 images, between two logged steps."""

    def generator_losses(self, batch):
        terms = super().generator_losses(batch)
        return {"adversarial": terms["adversarial"] * (float("nan") if self.images_seen >= 40 else 1)}


class Explodes(WGANGP):
    """The critic gradient is NaN although the loss is finite."""

    def critic_losses(self, batch):
        value = (self.critic[1].weight * 0).abs().sum().sqrt()  # the derivative of the square root at zero is infinite
        return {"root": value * 0 + self.critic(batch["image"]).mean() * 0 + 1}


@pytest.mark.parametrize(
    ("name", "interval", "message"),
    [
        ("Breaks", "50", "loss 'generator/adversarial' is nan after 48 images. Lower model.learning_rate (now 0.001)"),
        ("Explodes", "1", "the gradient's norm of 'critic' is nan after 4 images. Lower model.learning_rate (now 0.001)"),
    ],
)
def test_non_finite_loss_or_gradient_stops_the_run(workdir, capfd, monkeypatch, name, interval, message):
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
    model = {"class_path": f"tests.modules.test_phases.{name}", "init_args": {}}
    recipe = write_generative_recipe(workdir / "tiny.yaml", model)
    assert forked(main, ["fit", str(recipe), "--run", "r", "--trainer.log_every_n_steps", interval]) == 2
    assert message in capfd.readouterr().err
    if name == "Breaks":
        saved = checkpoint(workdir, recipe, "r")
        assert saved["images_seen"] == 40
        assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_global_step_counts_batches(workdir, monkeypatch):
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
    recipe = write_generative_recipe(workdir / "tiny.yaml", {"class_path": "tests.helpers.wgan_gp.WGANGP", "init_args": {}})
    assert forked(fit, recipe, "--run", "r", "--trainer.max_steps", "10") == 0
    saved = checkpoint(workdir, recipe, "r")
    assert (saved["global_step"], saved["images_seen"]) == (10, 40)
    log = read_metrics_csv(workdir / "runs/tiny/r/metrics.csv")
    logged_steps = {
        name: [int(row["step"]) for row in log if row["name"] == f"train/{name}"]
        for name in ("critic/real", "generator/adversarial")
    }
    assert logged_steps["critic/real"] == list(range(10))
    assert logged_steps["generator/adversarial"] == [1, 3, 5, 7, 9]
    steps = [int(state["step"]) for optimizer in saved["optimizer_states"] for state in optimizer["state"].values()]
    assert set(steps) == {10}  # 10 updates of the critic; 5 times 2 of the generator


def test_fp16_skips_overflowing_steps_and_trains(workdir, monkeypatch):
    """For fp16 on a CPU, Lightning requires an explicit scaler. The initial scale overflows in every phase."""
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
    recipe = write_generative_recipe(workdir / "tiny.yaml", {"class_path": "tests.helpers.wgan_gp.WGANGP", "init_args": {}})
    content = yaml.safe_load(recipe.read_text())
    scaler = {"class_path": "torch.amp.GradScaler", "init_args": {"device": "cpu", "init_scale": 2.0**120}}
    plugin = {"precision": "16-mixed", "device": "cpu", "scaler": scaler}
    path = "lightning.pytorch.plugins.precision.MixedPrecision"
    content["trainer"]["plugins"] = [{"class_path": path, "init_args": plugin}]
    recipe.write_text(yaml.safe_dump(content))
    assert forked(fit, recipe, "--run", "r", "--model.total_images", "400") == 0
    saved = checkpoint(workdir, recipe, "r")
    assert 1 < saved["MixedPrecision"]["scale"] < 2.0**40
    updates = [int(state["step"]) for optimizer in saved["optimizer_states"] for state in optimizer["state"].values()]
    assert all(20 < steps < 100 for steps in updates)  # of 100 steps; the first ones overflow


@pytest.mark.slow
@pytest.mark.parametrize(("function", "content"), [("losses", "loss terms"), ("schedule", "settings of the optimizer")])
def test_phase_functions_must_return_a_dict(function, content):
    functions = {"losses": lambda batch: {}, "schedule": lambda images_seen: {"lr": 1.0}}
    phase = Phase("critic", **{**functions, function: lambda argument: torch.zeros(1)})
    assert expect_dict({"real": 1}, phase, function, content) == {"real": 1}
    with pytest.raises(TypeError, match=f"phase 'critic': `{function}` returned Tensor. Return a dict of {content} by name"):
        expect_dict(getattr(phase, function)(0), phase, function, content)


@pytest.mark.slow
def test_compiled_networks_match_uncompiled_ones(workdir, monkeypatch):
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
    model = {
        "class_path": "tests.helpers.deterministic_variants.DeterministicDCGAN",
        "init_args": {"channels": 1, "size": 28, "kernel": 4, "base_channels": 8, "total_images": 60},
    }
    recipe = write_generative_recipe(workdir / "tiny.yaml", model)
    for run, compiled in (("plain", "false"), ("compiled", "true")):
        assert forked(fit, recipe, "--run", run, "--compile", compiled) == 0
    plain, compiled = (checkpoint(workdir, recipe, run)["state_dict"] for run in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name in plain:
        assert torch.allclose(plain[name], compiled[name], atol=1e-4), name


def test_indivisible_batch_size_raises_user_error(workdir, capfd):
    recipe = write_generative_recipe(workdir / "tiny.yaml", {"class_path": "tests.helpers.wgan_gp.WGANGP", "init_args": {}})
    assert forked(main, ["fit", str(recipe), "--accumulate_grad_batches", "3"]) == 2
    error = capfd.readouterr().err
    assert "data.batch_size: 4" in error
    assert "--accumulate_grad_batches 3" in error


def test_mismatched_phases_and_optimizers_raise():
    phase = Phase("a", lambda batch: {}, lambda images_seen: {})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    with pytest.raises(TypeError, match="a, a"):
        bind_phases([phase, phase], {"a": optimizer})
    for optimizers in ({}, {"b": optimizer}, {"a": optimizer, "b": optimizer}):
        with pytest.raises(TypeError, match="the phases use the optimizers"):
            bind_phases([phase], optimizers)
