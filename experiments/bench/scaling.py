"""`darkroom scaling`: measure the speedup of several processes on this machine, and estimate it for 8 and 64 GPUs.

Weak scaling: every process has the recipe's batch size, so the work per process is constant and only communication is added.
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
from experiments.bench.scaling_report import render
from experiments.cli.errors import parameters
from experiments.results.records import commit
from experiments.run.recipes import Recipe

FOLDER = ROOT / "experiments/bench"
RECORD, PAGE = FOLDER / "scaling.json", FOLDER / "SCALING.md"
TRIAL_STEPS = 5  # steps of a short run, which determines the number of steps per interval
MIN_STEPS, MAX_STEPS = 5, 1000  # steps per interval


def scaling(recipes: Sequence[Recipe], processes: int, rounds: int, seconds: float, write: bool) -> None:
    """Time recipes in one process and in several, and print the results.

    Args:
        recipes: recipes to train; their data must be available.
        processes: processes that train together.
        rounds: number of interleaved intervals of each kind.
        seconds: duration of an interval in one process.
        write: save the record to `experiments/bench/scaling.json` and the page to `experiments/bench/SCALING.md`.

    Raises:
        UserError: a recipe cannot be trained, or an interval failed; the message contains its output.
    """
    for recipe in recipes:
        if "total_images" not in parameters(recipe.class_path("model")):
            raise UserError(f"{recipe.name} has nothing to train. Choose a recipe with training")
    argv = ["scaling", *(recipe.name for recipe in recipes), "--processes", processes, "--rounds", rounds]
    record = {
        "command": "darkroom " + shlex.join(map(str, [*argv, "--seconds", f"{seconds:g}"])),
        "commit": commit(),
        "processes": processes,
        "runs": [time_recipe(recipe, processes, rounds, seconds) for recipe in recipes],
    }
    if write:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(render(record))
    Console().print(Markdown(render(record)))


def time_recipe(recipe: Recipe, processes: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Return the cost of a recipe's step, and its duration in seconds, one value per interval.

    There are three kinds of intervals: "single", one process; "ddp", several processes that average gradients; "independent",
    as many processes without communication. Each process has the same number of threads in all three kinds.
    """
    trial = run_independent(recipe, TRIAL_STEPS, 1, processes)[0]
    steps = min(MAX_STEPS, max(MIN_STEPS, round(seconds / trial["seconds"])))
    spent: dict[str, list[float]] = {"single": [], "ddp": [], "independent": []}
    for i in range(rounds):
        print(f"{recipe.name}: round {i + 1} of {rounds}, intervals of {steps} steps", file=sys.stderr, flush=True)
        spent["single"].append(run_independent(recipe, steps, 1, processes)[0]["seconds"])
        spent["ddp"].append(run_ddp(recipe, steps, processes, trial["batch"])["seconds"])
        spent["independent"].append(
            statistics.mean(result["seconds"] for result in run_independent(recipe, steps, processes, processes))
        )
    return {"recipe": recipe.name, "steps": steps, **trial, "seconds": spent}


def run_independent(recipe: Recipe, steps: int, count: int, core_groups: int) -> list[dict[str, Any]]:
    """Train in `count` concurrent processes without communication, each on a separate device."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for index in range(count):
            argv = [
                "-m",
                "experiments.bench.scaling_worker",
                str(recipe.path),
                str(steps),
                "--trainer.devices",
                device_argument(index),
            ]
            processes.append(start(argv, Path(folder) / str(index), core_groups))
        return [read_result(process, recipe) for process in processes]


def run_ddp(recipe: Recipe, steps: int, processes: int, batch: int) -> dict[str, Any]:
    """Train under torchrun with `processes` processes and a total batch of `processes` times `batch`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    argv = ["-m", "experiments.bench.scaling_worker", str(recipe.path), str(steps), "--trainer.devices", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        batch_size = ["--data.batch_size", str(batch * processes)]
        return read_result(start([*launcher, *argv, *batch_size], Path(folder), processes), recipe)


def device_argument(index: int) -> str:
    """Return the value of Lightning's `devices` for one device: the GPU of this index, or one CPU process."""
    import torch

    return f"[{index}]" if torch.cuda.is_available() else "1"


def start(argv: Sequence[str], runs: Path, core_groups: int) -> subprocess.Popen[str]:
    """Start a Python process whose ranks have 1 / `core_groups` of the CPU cores as threads."""
    threads = str(max(1, (os.cpu_count() or 1) // core_groups))
    environment = {**os.environ, "DARKROOM_RUNS": str(runs), "OMP_NUM_THREADS": threads}
    return subprocess.Popen([sys.executable, *argv], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_result(process: subprocess.Popen[str], recipe: Recipe) -> dict[str, Any]:
    """Wait for a process and parse the last line of its output.

    Raises:
        UserError: the process failed; the message contains its error.
    """
    stdout, stderr = process.communicate()
    if process.returncode:
        _, _, message = stderr.partition("darkroom: ")  # torchrun prints other lines before and after
        lines = message.splitlines() or stderr.strip().splitlines()[::-1] or [f"status {process.returncode}"]
        raise UserError(f"{recipe.name} cannot be timed: {lines[0]}")
    result: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return result
