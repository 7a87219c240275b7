"""Tests of a method on a GPU, which the contract of all methods includes; `make test-gpu` runs them.

`DARKROOM_TEST_DEVICE=cpu` runs them on the CPU in place of the GPU, as a test of the tests.
"""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from callbacks.run.csv_logger import read_metrics_csv
from experiments.cli.main import main
from experiments.run.execute import execute
from experiments.run.recipes import find_recipe
from tests.helpers.fake_gpu import run_on_a_fake_gpu
from tests.helpers.subprocess_helpers import forked, two_forked

DEVICE = os.environ.get("DARKROOM_TEST_DEVICE", "cuda")
ON_DEVICE = ["--trainer.accelerator", DEVICE, "--trainer.devices", "1"]
ON_TWO_DEVICES = ["--trainer.accelerator", DEVICE, "--trainer.devices", "2"]


def train(recipe: Path, *overrides: str) -> None:
    execute("fit", find_recipe(str(recipe)), list(overrides))


def with_callback(recipe: Path, name: str) -> Path:
    """Write a copy of a recipe with another probe, and without the metrics."""
    content = yaml.safe_load(recipe.read_text())
    content["trainer"]["callbacks"] = [{"class_path": f"tests.helpers.probe_callbacks.{name}"}]
    content["monitor"] = None
    if "test" in content["data"]["init_args"]:
        content["data"]["init_args"]["test"] = []
    path = recipe.with_name(f"{name.lower()}.yaml")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def losses(workdir: Path, recipe: Path, run: str) -> list[float]:
    rows = read_metrics_csv(workdir / "runs" / recipe.stem / run / "metrics.csv")
    return [float(row["value"]) for row in rows if row["name"].startswith("train/")]


class GPUContract:
    """Tests that train the small recipe of a method on a GPU."""

    deterministic_model: ClassVar[str]
    assert_same_run: Any  # of the contract
    synchronizes: ClassVar[str] = ""  # why a step waits for the device

    def test_steps_need_no_values_and_one_device(self, workdir: Path, recipe: Path) -> None:
        """Without a GPU: an operation that combines tensors of the CPU and of the GPU, or reads a value, raises an error."""
        if torch.__version__ < "2.14":
            pytest.skip("fake tensors of older versions of torch need a GPU")
        if self.synchronizes:
            pytest.skip(self.synchronizes)
        assert forked(run_on_a_fake_gpu, find_recipe(str(recipe))) == 0

    @pytest.mark.gpu
    def test_gpu_steps_do_not_wait_for_the_device(self, workdir: Path, recipe: Path) -> None:
        """Neither do the copies of the data between the steps. On the CPU, the probe of all recipes checks the steps."""
        if self.synchronizes:
            pytest.skip(self.synchronizes)
        path = with_callback(recipe, "NoSynchronization")
        overrides = ["--run", "free", "--trainer.log_every_n_steps", "1000", "--val_every_images", "60"]
        assert forked(train, path, *overrides, *ON_DEVICE) == 0

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
    def test_gpu_trains_and_evaluates(self, workdir: Path, recipe: Path, precision: str) -> None:
        if DEVICE == "cpu" and precision == "16-mixed":
            pytest.skip("16-mixed needs a GPU")
        assert forked(main, ["fit", str(recipe), "--run", "one", "--trainer.precision", precision, *ON_DEVICE]) == 0
        assert forked(main, ["test", str(recipe), "--run", "one", "--trainer.precision", precision, *ON_DEVICE]) == 0

    @pytest.mark.gpu
    def test_gpu_matches_the_cpu(self, workdir: Path, recipe: Path) -> None:
        """In float64, only the order of sums differs; in float32 without TF32, the losses of the first step are close.

        With loader workers, the data are prepared on the CPU in both runs.
        """
        for precision, run in (("64-true", "double"), ("32-true", "single")):
            overrides = ["--model", self.deterministic_model, "--trainer.precision", precision, "--data.num_workers", "1"]
            assert forked(train, recipe, "--run", f"{run}-cpu", *overrides) == 0
            assert forked(train, recipe, "--run", f"{run}-gpu", *overrides, *ON_DEVICE) == 0
        left, right = (losses(workdir, recipe, f"double-{device}") for device in ("cpu", "gpu"))
        assert left == pytest.approx(right, rel=1e-5, abs=1e-7)  # logs are in single precision
        left, right = (losses(workdir, recipe, f"single-{device}") for device in ("cpu", "gpu"))
        assert left[0] == pytest.approx(right[0], rel=1e-4)

    @pytest.mark.gpu
    def test_gpu_metrics_match_the_cpu(self, workdir: Path, recipe: Path) -> None:
        """The metrics of the same weights, computed on both devices."""
        assert forked(train, recipe, "--run", "one", *ON_DEVICE) == 0
        records: list[dict[str, Any]] = []
        for run, options in (("cpu", ["--trainer.accelerator", "cpu"]), ("gpu", ON_DEVICE)):
            record = workdir / f"{run}.json"
            assert forked(main, ["test", str(recipe), "--run", "one", "--record", str(record), *options]) == 0
            records.append(json.loads(record.read_text())["metrics"])
        assert records[0].keys() == records[1].keys()
        for dataset, protocols in records[0].items():
            for protocol, values in protocols.items():
                expected = {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in values["images"].items()}
                assert records[1][dataset][protocol]["images"] == expected, (dataset, protocol)

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
    def test_gpu_resumes_exactly_with_deterministic_kernels(
        self, workdir: Path, recipe: Path, monkeypatch: Any, precision: str
    ) -> None:
        """Also with the scale of the losses of fp16."""
        if DEVICE == "cpu" and precision == "16-mixed":
            pytest.skip("16-mixed needs a GPU")
        options = ["--trainer.deterministic", "true", "--trainer.precision", precision, *ON_DEVICE]
        assert forked(train, recipe, "--run", "full", *options) == 0
        monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@32@0")
        assert forked(train, recipe, "--run", "resumed", *options) == 85
        monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
        assert forked(train, recipe, "--run", "resumed", *options) == 0
        self.assert_same_run(workdir, recipe, "full", "resumed")

    @pytest.mark.gpu
    def test_gpu_memory_does_not_grow(self, workdir: Path, recipe: Path) -> None:
        if self.synchronizes:
            pytest.skip("the memory of a batch depends on the number of its objects")
        path = with_callback(recipe, "ConstantMemory")
        overrides = ["--model.total_images", "480", "--val_every_images", "480", "--data.num_workers", "2"]
        assert forked(train, path, "--run", "long", "--trainer.log_every_n_steps", "10", *overrides, *ON_DEVICE) == 0

    @pytest.mark.gpu
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_gpu_trains_in_a_process_group_of_one(self, workdir: Path, recipe: Path, strategy: str) -> None:
        """NCCL starts, and the weights are broadcast; averages of gradients need two GPUs."""
        options = ["--trainer.strategy", strategy, *ON_DEVICE]
        assert forked(train, recipe, "--run", strategy, "--model", self.deterministic_model, *options) == 0

    @pytest.mark.gpus2
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_two_gpus_match_one(self, workdir: Path, recipe: Path, monkeypatch: Any, strategy: str) -> None:
        """With the second half of the run in new processes, which load what the first ones have saved."""
        overrides = ["--model", self.deterministic_model, "--trainer.precision", "64-true"]
        assert forked(train, recipe, "--run", "one", *overrides, *ON_DEVICE) == 0
        options = ["--run", "two", *overrides, "--trainer.strategy", strategy, *ON_TWO_DEVICES]
        monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@32@1")
        statuses, output = two_forked(train, recipe, *options)
        assert statuses == [85, 0], output  # the first process alone has the status of a stopped run
        monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
        statuses, output = two_forked(train, recipe, *options)
        assert statuses == [0, 0], output
        assert losses(workdir, recipe, "one") == pytest.approx(losses(workdir, recipe, "two"), rel=1e-5, abs=1e-7)
