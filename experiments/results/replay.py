"""Replays for `experiments/results/check.py`: the first training steps and an evaluation, with each of two code versions."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from callbacks.run.csv_logger import read_metrics_csv
from callbacks.run.record_file import read_record
from datamodules.generation import Generation
from datamodules.io.paths import data_root
from experiments.cli.errors import parameters
from experiments.results.renames import Renames
from experiments.run.recipes import Recipe, find_recipe
from experiments.run.run_dir import Run
from modules.networks.weights import weights_hash

STEPS = 20  # training steps of a replay from each stage start, with a validation after half of them
# Limits for the validations of a replay and the evaluation of its weights: number of batches, and options of metrics that load
# other items.
EVAL_BATCHES = 5
METRIC_ITEMS = {"per_class": 10, "repeats": 2}


@dataclass(frozen=True)
class Code:
    """One of the two code versions that are compared.

    Args:
        root: root folder of the code.
        recipe: path of the recipe file in this folder.
        runs: folder of the runs with this code.
        renames: maps from the names in this code to current names.
    """

    root: Path
    recipe: Path
    runs: Path
    renames: Renames

    def command(self, *words: str) -> subprocess.Popen[str]:
        """Start a `darkroom` command with this code, on one thread."""
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("DARKROOM_RUN")},
            "PYTHONPATH": os.pathsep.join([str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "DARKROOM_DATA": str(data_root().absolute()),
            "DARKROOM_RUNS": str(self.runs),
            "DARKROOM_CACHE": str(self.runs / "cache"),
        }
        program = [sys.executable, "-m", "experiments", *words]
        return subprocess.Popen(
            program, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def option(self, name: str) -> str:
        """Return the option of this code that corresponds to a current option."""
        return f"--{self.renames.old_option(name)}"

    @property
    def weights(self) -> Path:
        """Path of the committed weights of the recipe."""
        return self.recipe.parent.parent / "weights" / f"{self.recipe.stem}.safetensors"

    def run(self, name: str) -> Run:
        """Return the run of the recipe with this name."""
        return Run(self.runs / self.renames.old_recipe(_recipe_name(self.recipe)) / name)


class Mismatch(Exception):
    """The results of the two code versions differ; the message contains the difference and its size."""


class Uncheckable(Exception):
    """The record cannot be checked; the message contains the reason."""


def replay(
    codes: list[Code], seed: int, batch_size: int, name: str, start: int, resume_from: str, updated: Collection[str]
) -> None:
    """Train a few steps with both code versions, and compare logs and weights.

    Args:
        codes: the certified and the current code.
        seed: seed of the training.
        batch_size: images per batch.
        name: name of the run.
        start: images seen at which the replay starts.
        resume_from: name of an earlier run whose checkpoint is used; empty to start from new weights.
        updated: metrics whose logs are not compared.

    Raises:
        Mismatch: the logs or the weights differ, or the current code fails.
        Uncheckable: the certified code fails.
    """
    steps = 0
    for code in codes:
        if resume_from:
            shutil.copytree(code.run(resume_from).folder, code.run(name).folder)
            steps = _seek(code.run(name).checkpoints / "last.ckpt", start)
    tested = "test" in parameters(find_recipe(str(codes[-1].recipe)).class_path("data"))
    without_test = ("--data.test", "[]") if tested else ()  # toy data have no test sets to leave out
    commands = [
        code.command(
            *("fit", str(code.recipe), "--run", name, "--seed_everything", str(seed), *without_test),
            *(code.option("val_every_images"), str(STEPS // 2 * batch_size)),
            *("--trainer.max_steps", str(steps + STEPS), "--trainer.limit_val_batches", str(EVAL_BATCHES)),
            *("--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"),
        )
        for code in codes
    ]
    _finish(commands)
    old, new = (_log(code, name, updated) for code in codes)
    if old != new:
        raise Mismatch(f"the log, from {start} images on: {_first_difference(old, new)}")
    left, right = (_weights(code, name) for code in codes)
    if left.keys() != right.keys():
        raise Mismatch(f"the names of the weights differ: {', '.join(sorted(left.keys() ^ right.keys())[:5])}")
    unequal = {name: _distance(left[name], right[name]) for name in left if not torch.equal(left[name], right[name])}
    if unequal:
        worst = max(unequal, key=lambda name: unequal[name])
        raise Mismatch(f"{len(unequal)} of {len(left)} weights differ, from {start} images on: {worst} by {unequal[worst]:.3g}")


def _seek(path: Path, start: int) -> int:
    """Set the position of a checkpoint to `start` images seen, and return its global step."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    content["images_seen"] = start
    for state in content.values():
        if isinstance(state, dict) and {"batch_size", "seed"} < state.keys():  # the datamodule's
            state.update(dict.fromkeys(state.keys() - {"batch_size", "seed"}, start))
    torch.save(content, path)
    return int(content["global_step"])


def _finish(commands: list[subprocess.Popen[str]]) -> None:
    """Wait for the command of each code version.

    Raises:
        Uncheckable: the command failed with the certified code.
        Mismatch: the command failed with the current code.
    """
    try:
        outputs = [command.communicate()[0] for command in commands]
    finally:
        for command in commands:
            command.kill()
            command.wait()
    for i, (command, output) in enumerate(zip(commands, outputs, strict=True)):
        if command.returncode:
            last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
            if i < len(commands) - 1:
                raise Uncheckable(f"the certified code failed with status {command.returncode}: {last}")
            raise Mismatch(f"the current code failed with status {command.returncode}: {last}")


def _log(code: Code, name: str, updated: Collection[str]) -> list[tuple[str, str, str, str]]:
    rows = [row for row in read_metrics_csv(code.run(name).log) if not set(updated).intersection(row["name"].split("/"))]
    return sorted((row["step"], row["images"], code.renames.name(row["name"]), row["value"]) for row in rows)


def _weights(code: Code, name: str) -> dict[str, torch.Tensor]:
    content = torch.load(code.run(name).checkpoints / "last.ckpt", map_location="cpu", weights_only=True)
    return {code.renames.weight(key): value for key, value in content["state_dict"].items()}


def _first_difference(old: list[tuple[str, str, str, str]], new: list[tuple[str, str, str, str]]) -> str:
    before, after = ({row[:3]: row[3] for row in rows} for rows in (old, new))
    keys = [
        row[:3]
        for row in sorted({*old, *new}, key=lambda row: (int(row[1]), row[2]))
        if before.get(row[:3]) != after.get(row[:3])
    ]
    _, images, name = keys[0]
    return f"{name} after {images} images was {before.get(keys[0], 'absent')}, is now {after.get(keys[0], 'absent')}"


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return math.inf if left.shape != right.shape else (left.double() - right.double()).abs().max().item()


def evaluate(codes: list[Code], replay: str, all_samples: bool = False) -> list[dict[str, Any]]:
    """Evaluate the committed weights, or the weights of the run `replay` if it is not empty, with each code version.

    Args:
        codes: the code versions.
        replay: name of the run.
        all_samples: generate all samples of the recipe with the weights of `replay`, and not only the first batches.

    Returns:
        For each code version, the results with current names: {dataset: {protocol: {name: value}}}, see `result_values`.

    Raises:
        Mismatch: the current code fails.
        Uncheckable: the certified code fails, or does not contain the same weights with the old names.
    """
    commands = []
    for code in codes:
        weights = code.run(replay).best_checkpoint if replay else _committed_weights(code, codes[-1])
        code.runs.mkdir(parents=True, exist_ok=True)
        recipe = few_items(code) if replay else code.recipe
        words = ["test", str(recipe), "--record", str(code.runs / "record.json"), "--trainer.accelerator", "cpu"]
        words += ["--ckpt", str(weights)] if weights.exists() else []
        words += (
            ["--trainer.limit_test_batches", str(EVAL_BATCHES)]
            if replay and has_large_batches(codes[-1]) and not all_samples
            else []
        )
        commands.append(code.command(*words))
    _finish(commands)
    results = []
    for code in codes:
        metrics = json.loads((code.runs / "record.json").read_text())["metrics"]
        results.append(
            {
                code.renames.name(dataset): {
                    code.renames.name(protocol): result_values(result) for protocol, result in protocols.items()
                }
                for dataset, protocols in metrics.items()
            }
        )
    return results


def has_large_batches(code: Code) -> bool:
    """Return whether the first batches of an evaluation are enough: batches of many images, and a single test set.

    Other datamodules evaluate single images, and the first ones would be of one dataset or direction.
    """
    recipe = Recipe("replay", code.recipe)
    return issubclass(recipe.load_class("data"), Generation) and len(recipe.content["data"]["init_args"].get("test", [])) == 1


def few_items(code: Code) -> Path:
    """Write a copy of the recipe whose metrics use few items, and return its path; a full linear probe takes an hour."""
    content = Recipe("few_items", code.recipe).content
    for callback in content.get("trainer", {}).get("callbacks", []):
        options = callback.get("init_args", {})
        options.update({name: value for name, value in METRIC_ITEMS.items() if name in options})
    path = code.runs / "few_items.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _committed_weights(code: Code, today: Code) -> Path:
    """Return the path of the current committed weights, with the parameter names of `code`.

    Raises:
        Uncheckable: parameters have been renamed, and the certified commit does not contain the same weights.
    """
    if code is today or not code.renames.weights or not today.weights.exists():
        return today.weights
    if code.weights.exists():
        old = {code.renames.weight(name): tensor for name, tensor in load_file(code.weights).items()}
        if weights_hash(old) == weights_hash(load_file(today.weights)):
            return code.weights
    raise Uncheckable("its parameters were renamed, and the certified commit does not contain the same weights")


def data_hashes(code: Code, trained: bool) -> dict[str, str]:
    """Return the hashes of the datasets of the replay and the evaluation; for a dataset of both, the hash of the evaluation."""
    records = [code.run("stage-0").record] if trained else []
    return {name: value for path in [*records, code.runs / "record.json"] for name, value in read_record(path)["data"].items()}


def result_values(result: dict[str, Any]) -> dict[str, float]:
    """Return the mean and the value of each image, by name."""
    images = result.get("images", result.get("pictures", {}))  # key in records without a checksum
    return {"mean": float(result["mean"]), **{f"image {name}": float(value) for name, value in images.items()}}


def _recipe_name(path: Path) -> str:
    return f"{path.parent.parent.name}/{path.stem}"
