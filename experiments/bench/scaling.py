"""`darkroom scaling`: what a second process gains here, what travels between them, and what many GPUs may gain.

Batches grow with the processes: each takes the recipe's batch, so that all have the same work and only what travels is added.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from datamodules.errors import UserError
from experiments import ROOT
from experiments.bench.scaling_report import page
from experiments.cli.errors import parameters
from experiments.results.records import commit
from experiments.run.recipes import Recipe

HERE = ROOT / "experiments/bench"
RECORD, PAGE = HERE / "scaling.json", HERE / "SCALING.md"
TRIAL = 5  # steps that tell how many fill a stretch
FEWEST, MOST = 5, 1000  # steps of a stretch


def scaling(recipes: Sequence[Recipe], processes: int, rounds: int, seconds: float, write: bool) -> None:
    """Time recipes in one process and in several, and show what came of it.

    Args:
        recipes: what to train; their data must be here.
        processes: how many share the larger batch.
        rounds: stretches of each kind, interleaved.
        seconds: of a stretch in one process.
        write: keep the figures as `experiments/bench/scaling.json`, and render them into `experiments/bench/SCALING.md`.

    Raises:
        Refused: a recipe cannot be trained, or a stretch has failed; its output is named.
    """
    for recipe in recipes:
        if "total_images" not in parameters(recipe.class_path("model")):
            raise UserError(f"{recipe.name} has nothing to train, and so nothing to time")
    words = ["scaling", *(recipe.name for recipe in recipes), "--processes", processes, "--rounds", rounds]
    record = {
        "command": "darkroom " + shlex.join(map(str, [*words, "--seconds", f"{seconds:g}"])),
        "commit": commit(),
        "processes": processes,
        "runs": [measured(recipe, processes, rounds, seconds) for recipe in recipes],
    }
    if write:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(page(record))
    Console().print(Markdown(page(record)))


def measured(recipe: Recipe, processes: int, rounds: int, seconds: float) -> dict[str, Any]:
    """What a recipe's step is made of, and its seconds, stretch by stretch.

    Three kinds: a process alone, several that work together, and as many that know nothing of each other. Each process has
    the same share of the cores in all three.
    """
    first = alone(recipe, TRIAL, 1, processes)[0]
    steps = min(MOST, max(FEWEST, round(seconds / first["seconds"])))
    spent: dict[str, list[float]] = {"alone": [], "together": [], "apart": []}
    for number in range(rounds):
        print(f"{recipe.name}: round {number + 1} of {rounds}, stretches of {steps} steps", file=sys.stderr, flush=True)
        spent["alone"].append(alone(recipe, steps, 1, processes)[0]["seconds"])
        spent["together"].append(together(recipe, steps, processes, first["batch"])["seconds"])
        spent["apart"].append(statistics.mean(found["seconds"] for found in alone(recipe, steps, processes, processes)))
    return {"recipe": recipe.name, "steps": steps, **first, "seconds": spent}


def alone(recipe: Recipe, steps: int, count: int, shares: int) -> list[dict[str, Any]]:
    """So many processes of their own, at the same time, each on a device of its own."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number in range(count):
            words = [
                "-m",
                "experiments.bench.scaling_worker",
                str(recipe.path),
                str(steps),
                "--trainer.devices",
                devices(number),
            ]
            started.append(start(words, Path(folder) / str(number), shares))
        return [figures(process, recipe) for process in started]


def together(recipe: Recipe, steps: int, processes: int, batch: int) -> dict[str, Any]:
    """Processes that share a batch so many times as large, started by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = ["-m", "experiments.bench.scaling_worker", str(recipe.path), str(steps), "--trainer.devices", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        larger = ["--data.batch_size", str(batch * processes)]
        return figures(start([*launcher, *words, *larger], Path(folder), processes), recipe)


def devices(number: int) -> str:
    """What Lightning calls a single device: the GPU of that number, or a process on the CPU."""
    import torch

    return f"[{number}]" if torch.cuda.is_available() else "1"


def start(words: Sequence[str], runs: Path, shares: int) -> subprocess.Popen[str]:
    """A process of ours, each of whose workers has one of so many shares of the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // shares))
    environment = {**os.environ, "DARKROOM_RUNS": str(runs), "OMP_NUM_THREADS": threads}
    return subprocess.Popen(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def figures(process: subprocess.Popen[str], recipe: Recipe) -> dict[str, Any]:
    """What a process has printed last.

    Raises:
        Refused: it has failed; with what it has said.
    """
    printed, complaints = process.communicate()
    if process.returncode:
        _, _, ours = complaints.partition("darkroom: ")  # torchrun says much beside it
        said = ours.splitlines() or complaints.strip().splitlines()[::-1] or [f"status {process.returncode}"]
        raise UserError(f"{recipe.name} cannot be timed: {said[0]}")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found
