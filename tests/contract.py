"""The contract that every method passes, inherited by its test class."""

import json
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from callbacks.csv_log import read_log
from datamodules.refused import Refused
from datamodules.superresolution import SuperResolution
from experiments.execute import execute
from experiments.recipes import find_recipe
from tests.forked import forked, launched, write_recipe


def fit(recipe: Path, *overrides: str) -> None:
    execute("fit", find_recipe(str(recipe)), list(overrides))


def checkpoint(workplace: Path, recipe: Path, run: str, name: str = "last") -> dict[str, Any]:
    return torch.load(workplace / "runs" / recipe.stem / run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_equal(left: Any, right: Any, where: str = "") -> None:
    """Equality bit for bit, through nested containers."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{where}/{i}")
    else:
        assert left == right, where


class Contract:
    """Subclasses name the model; 15 steps of 4 patches each, a validation every 5 steps."""

    model: ClassVar[dict[str, Any]]
    steady: ClassVar[str]  # the model with an optimizer whose steps depend steadily on the gradient, see tests/steady.py
    learns: ClassVar[list[str]]  # overrides of the run that must learn
    gain: ClassVar[float]  # dB that it must be above the first validation's

    @pytest.fixture
    def recipe(self, workplace: Path, photos: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "images": 60, "warmup": 8}}
        return write_recipe(workplace / "tiny.yaml", photos, model)

    def assert_same_run(self, workplace: Path, recipe: Path, one: str, other: str) -> None:
        for name in ("last", "best"):
            left, right = (checkpoint(workplace, recipe, run, name) for run in (one, other))
            for key in ("state_dict", "optimizer_states", "images_seen", "SuperResolution", "global_step"):
                assert_equal(left[key], right[key], key)
        logs = [read_log(workplace / "runs" / recipe.stem / run / "metrics.csv") for run in (one, other)]
        assert len(logs[0]) > 30
        assert logs[0] == logs[1]

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(
        "signal_at",
        [
            pytest.param("SIGKILL@32@0", id="killed in mid-interval"),
            pytest.param("SIGKILL@44@0", id="killed a step after a checkpoint", marks=pytest.mark.slow),
            pytest.param("SIGTERM@32@0", id="terminated in mid-interval"),
            pytest.param("SIGTERM@40@0", id="terminated where a validation is due"),
            pytest.param("SIGINT@20@0", id="interrupted at the first validation", marks=pytest.mark.slow),
        ],
    )
    def test_resumed_run_is_the_uninterrupted_one(self, workplace, recipe, monkeypatch, signal_at, workers):
        loader = f"--data.workers={workers}"
        assert forked(fit, recipe, "--run", "whole", loader) == 0
        monkeypatch.setenv("DARKROOM_TEST_SIGNAL", signal_at)
        output = workplace / "output.txt"
        status = forked(fit, recipe, "--run", "broken", loader, output=output)
        expected = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 85, "SIGINT": 130}[signal_at.partition("@")[0]]
        assert status == expected, output.read_text()
        if expected > 0:
            assert f" fit {recipe} {loader} --run broken" in output.read_text()
        assert checkpoint(workplace, recipe, "broken")["images_seen"] < 60
        monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
        assert forked(fit, recipe, "--run", "broken", loader) == 0
        self.assert_same_run(workplace, recipe, "whole", "broken")

    def test_trains_as_a_hand_written_loop_does(self, workplace, recipe, photos):
        assert forked(fit, recipe, "--run", "house") == 0
        config = find_recipe(str(recipe)).content
        torch.manual_seed(0)
        import importlib

        module_name, _, class_name = self.model["class_path"].rpartition(".")
        method = getattr(importlib.import_module(module_name), class_name)(**config["model"]["init_args"])
        data = SuperResolution(**config["data"]["init_args"])
        data.setup("fit")
        optimizer = method.configure_optimizers()
        batches = iter(data.train_dataloader())
        for step in range(15):
            for group in optimizer.param_groups:
                group["lr"] = method.schedule(4 * step)
            batch = data.pairs(next(batches)["patches"])
            optimizer.zero_grad()
            sum(method.losses(batch).values()).backward()
            optimizer.step()
        assert_equal(checkpoint(workplace, recipe, "house")["state_dict"], method.state_dict())

    def test_two_processes_with_half_the_batch_equal_one(self, workplace, recipe):
        exact = ["--model", self.steady, "--trainer.precision", "64-true", "--data.test", "[photographs/test]"]
        assert forked(fit, recipe, "--run", "one", *exact) == 0
        done = launched("fit", recipe, "--run", "two", "--trainer.devices", "2", *exact)
        assert done.returncode == 0, done.stderr
        left, right = (checkpoint(workplace, recipe, run)["state_dict"] for run in ("one", "two"))
        for name in left:
            assert (left[name] - right[name]).abs().max() < 1e-9, name
        logs = [read_log(workplace / "runs" / recipe.stem / run / "metrics.csv") for run in ("one", "two")]
        figures = [[float(row["value"]) for row in log] for log in logs]
        assert figures[0] == pytest.approx(figures[1], abs=1e-6)
        one, two = (json.loads((workplace / "runs" / recipe.stem / run / "record.json").read_text()) for run in ("one", "two"))
        for protocol, of_one in one["metrics"]["photographs-test"].items():  # three pictures: the shares are uneven
            assert of_one["pictures"] == pytest.approx(two["metrics"]["photographs-test"][protocol]["pictures"], abs=1e-5)

    def test_bf16_stays_near_fp32(self, workplace, recipe):
        assert forked(fit, recipe, "--run", "own optimizer", "--trainer.precision", "bf16-mixed") == 0
        steady = ["--model", self.steady]
        assert forked(fit, recipe, "--run", "fp32", *steady) == 0
        assert forked(fit, recipe, "--run", "bf16", *steady, "--trainer.precision", "bf16-mixed") == 0
        left, right = (checkpoint(workplace, recipe, run)["state_dict"] for run in ("fp32", "bf16"))
        assert all(weights.dtype == torch.float32 for weights in right.values())
        assert any(not torch.equal(left[name], right[name]) for name in left)  # it did run in another precision
        logs = [read_log(workplace / "runs" / recipe.stem / run / "metrics.csv") for run in ("fp32", "bf16")]
        losses = [[float(row["value"]) for row in log if row["name"].startswith("train/")] for log in logs]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)

    def test_learns(self, workplace, recipe):
        assert forked(fit, recipe, "--run", "long", *self.learns) == 0
        log = read_log(workplace / "runs" / recipe.stem / "long" / "metrics.csv")
        quality = [float(row["value"]) for row in log if "-kept/psnr" in row["name"]]
        assert quality[-1] > quality[0] + self.gain

    def test_a_finished_run_is_not_trained_further_by_accident(self, workplace, recipe):
        assert forked(fit, recipe, "--run", "done") == 0
        with pytest.raises(Refused, match="is finished after 60 images"):
            os.environ.pop("DARKROOM_RUN_FOLDER", None)
            fit(recipe, "--run", "done")

    def test_exports_to_onnx(self, workplace):
        import importlib

        import onnxruntime

        module_name, _, class_name = self.model["class_path"].rpartition(".")
        method = getattr(importlib.import_module(module_name), class_name)(**self.model["init_args"]).eval()
        low = torch.rand(1, 1, 19, 23)
        expected = method(low).detach()
        path = str(workplace / "net.onnx")
        torch.onnx.export(method, (low,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path)
        (exported,) = session.run(None, {session.get_inputs()[0].name: low.numpy()})
        assert torch.allclose(torch.from_numpy(exported), expected, atol=1e-5)
