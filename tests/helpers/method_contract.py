"""The contract that every method passes, inherited by its test class."""

import importlib
import json
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from callbacks.run.csv_logger import read_metrics_csv
from datamodules.random.noise import derive_seed
from experiments.run.execute import execute
from experiments.run.recipes import find_recipe
from modules.training.ema import EMA
from modules.training.image_pool import ImagePool
from tests.helpers.subprocess_helpers import forked, two_forked
from tests.helpers.tiny_recipes import (
    write_generative_recipe,
    write_recipe,
    write_reconstruction_recipe,
    write_segmentation_recipe,
    write_translation_recipe,
)


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


def made(entry: dict[str, Any]) -> Any:
    """What a recipe's model or data entry describes."""
    module, _, name = entry["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**entry["init_args"])


class Contract(ABC):
    """Subclasses name the model, and have its `recipe`: 15 steps of 4 samples each, a validation every 5 steps."""

    model: ClassVar[dict[str, Any]]
    steady: ClassVar[
        str
    ]  # the model without what is each process's own or hangs on rounding, see tests/helpers/deterministic_variants.py
    learns: ClassVar[list[str]]  # overrides of the run that must learn
    rounding: ClassVar[float] = 0.02  # by how much, relatively, bf16 may move a loss
    rounded_at: ClassVar[tuple[str, ...]] = ()  # settings at which this is measured

    @abstractmethod
    def batches(self, data: Any) -> Iterator[dict[str, Any]]:
        """The training batches as the method gets them."""

    @abstractmethod
    def has_learned(self, log: list[dict[str, str]]) -> bool:
        """Whether the log of the long run shows it."""

    @abstractmethod
    def example(self) -> torch.Tensor:
        """An input of the feed-forward part."""

    def assert_same_run(self, workplace: Path, recipe: Path, one: str, other: str) -> None:
        for name in ("last", "best"):
            left, right = (checkpoint(workplace, recipe, run, name) for run in (one, other))
            for key in left.keys() - {"callbacks", "loops"}:  # wall times
                assert_equal(left[key], right[key], key)
        logs = [read_metrics_csv(workplace / "runs" / recipe.stem / run / "metrics.csv") for run in (one, other)]
        assert len(logs[0]) > 6
        assert logs[0] == logs[1]

    @pytest.mark.parametrize(
        ("signal_at", "workers", "log_every"),
        [
            pytest.param("SIGKILL@32@0", 2, 1, id="killed in mid-interval"),
            pytest.param("SIGKILL@32@0", 0, 1, id="killed in mid-interval, no workers", marks=pytest.mark.slow),
            pytest.param("SIGKILL@44@0", 0, 1, id="killed a step after a checkpoint", marks=pytest.mark.slow),
            pytest.param("SIGTERM@32@0", 0, 7, id="terminated between two logs"),
            pytest.param("SIGTERM@40@0", 2, 7, id="terminated where a validation is due", marks=pytest.mark.slow),
            pytest.param("SIGINT@20@0", 0, 1, id="interrupted at the first validation", marks=pytest.mark.slow),
        ],
    )
    def test_resumed_run_is_the_uninterrupted_one(self, workplace, recipe, monkeypatch, signal_at, workers, log_every):
        settings = [f"--data.num_workers={workers}", f"--trainer.log_every_n_steps={log_every}"]
        assert forked(fit, recipe, "--run", "whole", *settings) == 0
        monkeypatch.setenv("DARKROOM_TEST_SIGNAL", signal_at)
        output = workplace / "output.txt"
        status = forked(fit, recipe, "--run", "broken", *settings, output=output)
        expected = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 85, "SIGINT": 130}[signal_at.partition("@")[0]]
        assert status == expected, output.read_text()
        if expected > 0:
            assert f" fit {recipe} {' '.join(settings)} --run broken" in output.read_text()
        assert checkpoint(workplace, recipe, "broken")["images_seen"] < 60
        monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
        assert forked(fit, recipe, "--run", "broken", *settings) == 0
        self.assert_same_run(workplace, recipe, "whole", "broken")

    def test_trains_as_a_hand_written_loop_does(self, workplace, recipe):
        """No freezing, no Trainer: each phase's optimizer steps in turn, on the whole batch."""
        assert forked(fit, recipe, "--run", "house") == 0
        config = find_recipe(str(recipe)).content
        torch.manual_seed(0)
        method, data = made(config["model"]), made(config["data"])
        data.setup("fit")
        optimizers = method.configure_optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for turn, batch in zip(range(15), self.batches(data), strict=False):
            torch.manual_seed(derive_seed(0, f"step/{4 * turn}/0"))
            place = {"positions": range(4 * turn, 4 * turn + 4), "repetition": 0}
            shared_forward = method.shared_forward({**batch, **place})
            for phase, optimizer in zip(method.phases(), optimizers, strict=True):
                if (turn + 1) % phase.interval:
                    continue
                for repetition in range(phase.n_updates):
                    place["repetition"] = repetition
                    if repetition:
                        shared_forward = method.shared_forward({**batch, **place})
                    for group in optimizer.param_groups:
                        group.update(phase.schedule(4 * turn))
                    method.zero_grad()
                    sum(phase.losses({**batch, **place, **shared_forward}).values()).backward()
                    if phase.max_grad_norm:
                        torch.nn.utils.clip_grad_norm_(phase.parameters, phase.max_grad_norm)
                    optimizer.step()
            for pool in (child for child in method.children() if isinstance(child, ImagePool)):
                pool.update(4)
            method.images_seen += 4
            for average in (child for child in method.children() if isinstance(child, EMA)):
                kept = 0.5 ** (4 / average.half_life)
                for mine, theirs in zip(average.parameters(), average.online.parameters(), strict=True):
                    mine.data = mine.lerp(theirs.detach(), 1 - kept)
        assert_equal(checkpoint(workplace, recipe, "house")["state_dict"], method.state_dict())

    def test_two_processes_with_half_the_batch_equal_one_also_in_parts(self, workplace, recipe):
        exact = ["--model", self.steady, "--trainer.precision", "64-true"]
        assert forked(fit, recipe, "--run", "one", *exact) == 0
        for run, parts in (("two", "1"), ("parts", "2")):
            status, said = two_forked(
                fit, recipe, "--run", run, "--trainer.devices", "2", "--accumulate_grad_batches", parts, *exact
            )
            assert status == [0, 0], said
            assert "recommended" not in said
        whole, *others = (checkpoint(workplace, recipe, run)["state_dict"] for run in ("one", "two", "parts"))
        for other in others:
            for name in whole:
                assert (whole[name] - other[name]).abs().max() < 1e-9, name
        logs = [read_metrics_csv(workplace / "runs" / recipe.stem / run / "metrics.csv") for run in ("one", "two")]
        figures = [[float(row["value"]) for row in log] for log in logs]
        assert figures[0] == pytest.approx(figures[1], abs=1e-6)
        one, two = (json.loads((workplace / "runs" / recipe.stem / run / "record.json").read_text()) for run in ("one", "two"))
        assert one["metrics"]
        for data_set, protocols in one["metrics"].items():  # an odd number of pictures or batches: the shares are uneven
            for protocol, of_one in protocols.items():
                assert of_one["images"] == pytest.approx(two["metrics"][data_set][protocol]["images"], abs=1e-5)

    def test_bf16_stays_near_fp32(self, workplace, recipe):
        assert forked(fit, recipe, "--run", "own optimizer", "--trainer.precision", "bf16-mixed") == 0
        steady = ["--model", self.steady, *self.rounded_at]
        assert forked(fit, recipe, "--run", "fp32", *steady) == 0
        assert forked(fit, recipe, "--run", "bf16", *steady, "--trainer.precision", "bf16-mixed") == 0
        left, right = (checkpoint(workplace, recipe, run)["state_dict"] for run in ("fp32", "bf16"))
        assert all(weights.dtype == torch.float32 for weights in right.values())
        assert any(not torch.equal(left[name], right[name]) for name in left)  # it did run in another precision
        logs = [read_metrics_csv(workplace / "runs" / recipe.stem / run / "metrics.csv") for run in ("fp32", "bf16")]
        losses = [[float(row["value"]) for row in log if row["name"].startswith("train/")] for log in logs]
        assert losses[0] == pytest.approx(losses[1], rel=self.rounding, abs=self.rounding / 10)

    def test_learns(self, workplace, recipe):
        assert forked(fit, recipe, "--run", "long", *self.learns) == 0
        assert self.has_learned(read_metrics_csv(workplace / "runs" / recipe.stem / "long" / "metrics.csv"))

    def test_exports_to_onnx(self, workplace):
        import onnxruntime

        method = made(self.model).eval()
        example = self.example()
        expected = method(example).detach()
        path = str(workplace / "net.onnx")
        torch.onnx.export(method, (example,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path)
        (exported,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
        assert torch.allclose(torch.from_numpy(exported), expected, atol=1e-5)


class SuperResolutionContract(Contract):
    gain: ClassVar[float]  # dB that it must be above the first validation's

    @pytest.fixture
    def recipe(self, workplace: Path, photos: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60, "warmup": 8}}
        return write_recipe(workplace / "tiny.yaml", photos, model, test=["photographs/test"])

    def batches(self, data: Any) -> Iterator[dict[str, Any]]:
        return (data.prepare_train_batch(batch["patches"]) for batch in data.train_dataloader())

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        quality = [float(row["value"]) for row in log if "-kept/psnr" in row["name"]]
        return quality[-1] > quality[0] + self.gain

    def example(self) -> torch.Tensor:
        return torch.rand(1, 1, 19, 23)


class GenerativeContract(Contract):
    nearer: ClassVar[float]  # what must be left of the first validation's Frechet distance

    @pytest.fixture
    def recipe(self, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("DARKROOM_CACHE", str(workplace / "cache"))
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_generative_recipe(workplace / "tiny.yaml", model)

    def batches(self, data: Any) -> Iterator[dict[str, Any]]:
        return (data.prepare_train_batch(batch) for batch in data.train_dataloader())

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        distances = [float(row["value"]) for row in log if "/fid/" in row["name"]]
        return distances[-1] < self.nearer * distances[0]

    def example(self) -> torch.Tensor:
        return made(self.model).sample_latents(range(3))


class SegmentationContract(Contract):
    """Subclasses say too what their network's training samples are: crop, margin, shrink."""

    samples: ClassVar[dict[str, int]]
    mark: ClassVar[float]  # of the coins' mean IoU

    @pytest.fixture
    def recipe(self, workplace: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_segmentation_recipe(workplace / "tiny.yaml", model, **self.samples)

    def batches(self, data: Any) -> Iterator[dict[str, Any]]:
        return (data.prepare_train_batch(batch) for batch in data.train_dataloader())

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        return max(float(row["value"]) for row in log if row["name"] == "coins-val/miou/pooled") > self.mark

    def example(self) -> torch.Tensor:
        side = self.samples["crop"] + self.samples["margin"]
        return torch.rand(1, 1, side, side)


class TranslationContract(Contract):
    @pytest.fixture
    def recipe(self, workplace: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_translation_recipe(workplace / "tiny.yaml", model)

    def batches(self, data: Any) -> Iterator[dict[str, Any]]:
        return (data.prepare_train_batch(batch) for batch in data.train_dataloader())

    def example(self) -> torch.Tensor:
        return torch.rand(1, 3, 24, 32)


class ReconstructionContract(Contract):
    mark: ClassVar[float]  # nats a digit: what its ELBO must rise above

    @pytest.fixture
    def recipe(self, workplace: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_reconstruction_recipe(workplace / "tiny.yaml", model)

    def batches(self, data: Any) -> Iterator[dict[str, Any]]:
        return (data.prepare_train_batch(batch) for batch in data.train_dataloader())

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        return [float(row["value"]) for row in log if "/elbo/" in row["name"]][-1] > self.mark

    def example(self) -> torch.Tensor:
        return torch.rand(2, 1, 28, 28)
