"""Tests that every method must pass. The test class of a method inherits them."""

import importlib
import json
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from callbacks.run.csv_logger import read_metrics_csv
from datamodules.random.noise import derive_seed
from experiments.bench.reference_loop import bare_batches, make_optimizers, make_reference_step
from experiments.run.execute import execute
from experiments.run.recipes import find_recipe
from modules.networks.weights import join_shards
from modules.training.phases import Batch, batch_size_of
from modules.training.stages import StagePlan
from tests.helpers.gpu_contract import GPUContract
from tests.helpers.subprocess_helpers import forked, two_forked


def fit(recipe: Path, *overrides: str) -> None:
    execute("fit", find_recipe(str(recipe)), list(overrides))


def checkpoint(workdir: Path, recipe: Path, run: str, name: str = "last") -> dict[str, Any]:
    path = workdir / "runs" / recipe.stem / run / "checkpoints" / f"{name}.ckpt"
    return join_shards(path, torch.load(path, weights_only=True))


def assert_equal(left: Any, right: Any, where: str = "") -> None:
    """Assert bitwise equality of nested containers."""
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


def instantiate(entry: dict[str, Any]) -> Any:
    """Instantiate the class of a model or data entry of a recipe."""
    module, _, name = entry["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**entry["init_args"])


def staged(batches: Iterator[Batch], plan: StagePlan, optimizers: dict[str, Any]) -> Iterator[Batch]:
    """Seed torch for each step, and reset the optimizers at the start of stages that require it, as `Method` does."""
    position = 0
    for batch in batches:
        torch.manual_seed(derive_seed(0, f"step/{position}/0"))
        if position in plan.starts[1:] and plan.stages[plan.index(position)].reset_optimizers:
            for optimizer in optimizers.values():
                optimizer.state.clear()
        yield batch
        position += batch_size_of(batch)


class Contract(GPUContract, ABC):
    """Tests of a method. Subclasses define `model` and a fixture `recipe`: 15 steps of 4 samples, validation every 5 steps."""

    model: ClassVar[dict[str, Any]]
    deterministic_model: ClassVar[str]  # class of tests/helpers/deterministic_variants.py, or the model itself
    training_overrides: ClassVar[list[str]]  # of the run in `test_training_improves_the_metric`
    bf16_rtol: ClassVar[float] = 0.02  # relative difference of losses between bf16 and fp32
    bf16_images: ClassVar[int] = 12  # of these runs, which are slow on processors without bf16
    learns_slowly: ClassVar[bool] = False  # whether `test_training_improves_the_metric` is a slow test
    bf16_overrides: ClassVar[tuple[str, ...]] = ()  # of the runs that compare bf16 with fp32

    @abstractmethod
    def has_learned(self, log: list[dict[str, str]]) -> bool:
        """Return whether the log of the long run shows an improvement."""

    @abstractmethod
    def example(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the input of `forward`, or its inputs."""

    def assert_same_run(self, workdir: Path, recipe: Path, one: str, other: str) -> None:
        for name in ("last", "best"):
            left, right = (checkpoint(workdir, recipe, run, name) for run in (one, other))
            for key in left.keys() - {"callbacks", "loops"}:  # these contain wall times
                assert_equal(left[key], right[key], key)
        logs = [read_metrics_csv(workdir / "runs" / recipe.stem / run / "metrics.csv") for run in (one, other)]
        assert len(logs[0]) > 6
        assert logs[0] == logs[1]

    @pytest.mark.parametrize(
        ("signals", "workers", "log_every"),
        [
            pytest.param(["SIGTERM@32@0", "SIGKILL@52@0"], 2, 3, id="terminated between two log steps, later killed"),
            pytest.param(["SIGKILL@32@0"], 2, 1, id="killed between validations", marks=pytest.mark.slow),
            pytest.param(["SIGKILL@32@0"], 0, 1, id="killed between validations, no workers", marks=pytest.mark.slow),
            pytest.param(["SIGKILL@44@0"], 0, 1, id="killed one step after a checkpoint", marks=pytest.mark.slow),
            pytest.param(["SIGTERM@32@0"], 0, 7, id="terminated between two log steps", marks=pytest.mark.slow),
            pytest.param(["SIGTERM@40@0"], 2, 7, id="terminated at a validation step", marks=pytest.mark.slow),
            pytest.param(["SIGINT@20@0"], 0, 1, id="interrupted at the first validation", marks=pytest.mark.slow),
        ],
    )
    def test_resumed_run_equals_the_uninterrupted_run(self, workdir, recipe, monkeypatch, signals, workers, log_every):
        settings = [f"--data.num_workers={workers}", f"--trainer.log_every_n_steps={log_every}"]
        assert forked(fit, recipe, "--run", "full", *settings) == 0
        for signal_at in signals:
            monkeypatch.setenv("DARKROOM_TEST_SIGNAL", signal_at)
            name, seen, _ = signal_at.split("@")
            output = workdir / f"{name}.txt"
            status = forked(fit, recipe, "--run", "resumed", *settings, output=output)
            expected = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 85, "SIGINT": 130}[name]
            assert status == expected, output.read_text()
            if expected > 0:
                assert f" fit {recipe} {' '.join(settings)} --run resumed" in output.read_text()
            assert checkpoint(workdir, recipe, "resumed")["images_seen"] <= int(seen)
        monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
        assert forked(fit, recipe, "--run", "resumed", *settings) == 0
        self.assert_same_run(workdir, recipe, "full", "resumed")

    def test_training_equals_a_plain_loop(self, workdir, recipe):
        """The loop does not use a Trainer. It runs the phases in order, on the full batch."""
        assert forked(fit, recipe, "--run", "trainer") == 0
        config = find_recipe(str(recipe)).content
        torch.manual_seed(0)
        method, data = instantiate(config["model"]), instantiate(config["data"])
        method.setup("fit")
        data.setup("fit")
        plan, optimizers = method.plan_stages(data), make_optimizers(method)
        method.inspect_data(data)
        batches = staged(bare_batches(data, method), plan, optimizers)
        step = make_reference_step(method, batches, optimizers)
        while method.images_seen < 60:
            step()
        assert_equal(checkpoint(workdir, recipe, "trainer")["state_dict"], method.state_dict())

    @pytest.mark.parametrize(
        ("strategy", "micro_batches"),
        [
            pytest.param("ddp", 1, marks=pytest.mark.slow),
            ("ddp", 2),
            pytest.param("fsdp2", 1, marks=pytest.mark.slow),
            pytest.param("fsdp2", 2, marks=pytest.mark.slow),
        ],
    )
    def test_two_ranks_match_one_rank(self, workdir, recipe, strategy, micro_batches):
        """One rank takes batches of 4. Two ranks take one micro-batch of 2, or accumulate the gradients of two of 1."""
        overrides = ["--model", self.deterministic_model, "--trainer.precision", "64-true"]
        assert forked(fit, recipe, "--run", "one", *overrides) == 0
        parts = ["--trainer.devices", "2", "--trainer.strategy", strategy, "--accumulate_grad_batches", str(micro_batches)]
        status, output = two_forked(fit, recipe, "--run", "two", *parts, *overrides)
        assert status == [0, 0], output
        assert "recommended" not in output
        single, two = (checkpoint(workdir, recipe, run)["state_dict"] for run in ("one", "two"))
        for name in single:
            assert (single[name] - two[name]).abs().max() < 1e-9, name
        logs = [read_metrics_csv(workdir / "runs" / recipe.stem / run / "metrics.csv") for run in ("one", "two")]
        values = [[float(row["value"]) for row in log] for log in logs]
        assert values[0] == pytest.approx(values[1], rel=1e-6, abs=1e-6)  # logs are in single precision
        records = (json.loads((workdir / "runs" / recipe.stem / run / "record.json").read_text()) for run in ("one", "two"))
        one, two = (record["metrics"] for record in records)
        assert one
        for dataset, protocols in one.items():  # an odd number of images or batches: ranks have unequal numbers
            for protocol, metrics in protocols.items():
                assert metrics["images"] == pytest.approx(two[dataset][protocol]["images"], abs=1e-5)

    def test_bf16_is_close_to_fp32(self, workdir, recipe):
        steps = ["--model.total_images", str(self.bf16_images)]
        overrides = ["--model", self.deterministic_model, *steps, *self.bf16_overrides]
        if self.deterministic_model != self.model["class_path"]:  # its optimizer also trains in bf16
            assert forked(fit, recipe, "--run", "original", *steps, "--trainer.precision", "bf16-mixed") == 0
        assert forked(fit, recipe, "--run", "fp32", *overrides) == 0
        assert forked(fit, recipe, "--run", "bf16", *overrides, "--trainer.precision", "bf16-mixed") == 0
        left, right = (checkpoint(workdir, recipe, run)["state_dict"] for run in ("fp32", "bf16"))
        assert all(weights.dtype == torch.float32 for weights in right.values() if weights.is_floating_point())
        assert any(not torch.equal(left[name], right[name]) for name in left)  # the precisions differ
        logs = [read_metrics_csv(workdir / "runs" / recipe.stem / run / "metrics.csv") for run in ("fp32", "bf16")]
        losses = [[float(row["value"]) for row in log if row["name"].startswith("train/")] for log in logs]
        assert losses[0] == pytest.approx(losses[1], rel=self.bf16_rtol, abs=self.bf16_rtol / 10)

    def test_training_improves_the_metric(self, workdir, recipe):
        seed = os.environ.get("DARKROOM_TEST_SEED", "0")  # to find the range of the result over seeds
        assert forked(fit, recipe, "--run", "long", *self.training_overrides, "--seed_everything", seed) == 0
        log = read_metrics_csv(workdir / "runs" / recipe.stem / "long" / "metrics.csv")
        metrics = [
            f"{row['name']} {row['value']}" for row in log if "/" in row["name"] and not row["name"].startswith("train/")
        ]
        print(f"seed {seed}:", *metrics, sep="\n")
        assert self.has_learned(log), metrics

    def test_exports_to_onnx(self, workdir):
        import onnxruntime

        method = instantiate(self.model).eval()
        example = self.example()
        inputs = example if isinstance(example, tuple) else (example,)
        expected = method(*inputs).detach()
        path = str(workdir / "net.onnx")
        torch.onnx.export(method, inputs, path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path)
        names = [entry.name for entry in session.get_inputs()]
        (exported,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        assert torch.allclose(torch.from_numpy(exported), expected, atol=1e-5)
