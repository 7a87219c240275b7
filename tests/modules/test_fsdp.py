"""FSDP2: divided networks take the steps that whole ones take."""

import json

import pytest
import torch

from callbacks.run.csv_logger import read_metrics_csv
from modules.training.optimizers import soap
from modules.vae import VAE
from tests.helpers.method_contract import assert_equal, checkpoint
from tests.helpers.subprocess_helpers import launched
from tests.helpers.tiny_recipes import write_generative_recipe, write_reconstruction_recipe

DCGAN = {"channels": 1, "size": 28, "kernel": 4, "base_channels": 8, "total_images": 60}
MODELS = {
    "alternating": ("tests.helpers.deterministic_variants.SteadyDCGAN", DCGAN, []),
    "averaged, clipped, penalised, many moves": ("tests.helpers.wgan_gp.WGANGP", {"total_images": 60}, []),
    "one loss, in parts": (
        "modules.vae.VAE",
        {"hidden_dims": [20], "latent_size": 3, "total_images": 60},
        ["--accumulate_grad_batches", "2"],
    ),
}


class Soapy(VAE):
    """With an optimizer that looks at whole matrices."""

    def configure_optimizers(self):
        return soap(self.parameters(), 1e-3)


def on_two(strategy, recipe, *words):
    return launched("fit", recipe, "--trainer.devices", "2", "--trainer.strategy", strategy, *words)


@pytest.fixture
def write(workplace, monkeypatch):
    monkeypatch.setenv("DARKROOM_CACHE", str(workplace / "cache"))

    def written(path, settings):
        writer = (
            write_reconstruction_recipe
            if path in ("modules.vae.VAE", "tests.modules.test_fsdp.Soapy")
            else write_generative_recipe
        )
        return writer(workplace / "tiny.yaml", {"class_path": path, "init_args": settings})

    return written


def assert_close(left, right, where):
    if isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6, msg=lambda text: f"{where}: {text}")
    else:
        assert left == right, where


def flat(value, where):
    """The leaves of nested containers, by their paths."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, part in items for name, leaf in flat(part, f"{where}/{key}").items()}
    return {where: value}


@pytest.mark.parametrize(
    "name",
    [
        "averaged, clipped, penalised, many moves",
        pytest.param("alternating", marks=pytest.mark.slow),
        pytest.param("one loss, in parts", marks=pytest.mark.slow),
    ],
)
def test_divided_is_as_whole_and_goes_on_as_if_uninterrupted(workplace, write, monkeypatch, name):
    path, settings, words = MODELS[name]
    recipe = write(path, settings)
    for strategy in ("ddp", "fsdp2"):
        ended = on_two(strategy, recipe, "--run", strategy, *words)
        assert ended.returncode == 0, ended.stderr
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@1")
    assert on_two("fsdp2", recipe, "--run", "broken", *words).returncode == 85
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    ended = on_two("fsdp2", recipe, "--run", "broken", *words)
    assert ended.returncode == 0, ended.stderr

    ddp, divided, broken = (checkpoint(workplace, recipe, run) for run in ("ddp", "fsdp2", "broken"))
    for key in ("state_dict", "optimizer_states", "pending_losses"):
        assert_equal(divided[key], broken[key], key)
        gather_full_tensors, parts = flat(dict(ddp[key]) if key == "state_dict" else ddp[key], key), flat(divided[key], key)
        assert gather_full_tensors.keys() == parts.keys()
        for leaf in gather_full_tensors:
            assert_close(gather_full_tensors[leaf], parts[leaf], leaf)
    logs = [read_metrics_csv(workplace / "runs/tiny" / run / "metrics.csv") for run in ("fsdp2", "broken")]
    assert logs[0] == logs[1]
    records = [json.loads((workplace / f"runs/tiny/{run}/record.json").read_text()) for run in ("ddp", "fsdp2")]
    assert records[0]["metrics"].keys() == records[1]["metrics"].keys()
    for of_set, others in zip(records[0]["metrics"].values(), records[1]["metrics"].values(), strict=True):
        for protocol, value in of_set.items():
            assert value["mean"] == pytest.approx(others[protocol]["mean"], rel=1e-3), protocol


@pytest.mark.slow
def test_a_run_goes_on_under_another_strategy(workplace, write):
    recipe = write("tests.helpers.deterministic_variants.SteadyDCGAN", DCGAN)
    for first, second in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
        assert on_two(first, recipe, "--run", first, "--model.total_images", "40").returncode == 0
        ended = on_two(second, recipe, "--run", first)
        assert ended.returncode == 0, ended.stderr
    left, right = (checkpoint(workplace, recipe, run)["state_dict"] for run in ("ddp", "fsdp2"))
    for key in left:
        assert_close(left[key], right[key], key)


@pytest.mark.slow
def test_each_process_holds_its_part(workplace, write):
    recipe = write("tests.helpers.deterministic_variants.SteadyDCGAN", DCGAN)
    watcher = "--trainer.callbacks+=tests.helpers.probe_callbacks.HoldsHalf"
    assert on_two("fsdp2", recipe, "--run", "parts", watcher).returncode == 0
    ended = on_two("ddp", recipe, "--run", "whole", watcher)
    assert ended.returncode == 1
    assert "of the weights and states are here" in ended.stderr


@pytest.mark.parametrize(
    ("strategy", "path", "settings", "complaint"),
    [
        pytest.param(
            *("fsdp2", "tests.modules.test_fsdp.Soapy", {"total_images": 60}, "fsdp2 cannot divide SOAP; take 'ddp'"),
            marks=pytest.mark.slow,
        ),
        (
            "fsdp",
            "modules.gan.GAN",
            {"hidden_dim": 60},
            "cannot train networks that alternate; take 'ddp', or 'fsdp2' to divide",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(workplace, write, strategy, path, settings, complaint):
    ended = on_two(strategy, write(path, settings), "--run", "refused")
    assert ended.returncode == 2, ended.stderr
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr
