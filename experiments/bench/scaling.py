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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from datamodules.errors import UserError
from experiments import ROOT
from experiments.bench.link import ADDRESSES, limited_link
from experiments.bench.scaling_report import render
from experiments.cli.errors import parameters
from experiments.results.records import commit
from experiments.run.recipes import Recipe

FOLDER = ROOT / "experiments/bench"
RECORD, PAGE = FOLDER / "scaling.json", FOLDER / "SCALING.md"
TRIAL_STEPS = 5  # steps of a short run, which determines the number of steps per interval
MIN_STEPS, MAX_STEPS = 5, 1000  # steps per interval


def scaling(recipes: Sequence[Recipe], processes: int, rounds: int, seconds: float, write: bool, bandwidth: str = "") -> None:
    """Time recipes in one process and in several, and print the results.

    Args:
        recipes: recipes to train; their data must be available.
        processes: processes that train together.
        rounds: number of interleaved intervals of each kind.
        seconds: duration of an interval in one process.
        bandwidth: rate of a link between two processes, such as "1gbit", for measurements in addition; empty for none.
        write: save the record to `experiments/bench/scaling.json` and the page to `experiments/bench/SCALING.md`.

    Raises:
        UserError: a recipe cannot be trained, or an interval failed; the message contains its output.
    """
    for recipe in recipes:
        if "total_images" not in parameters(recipe.class_path("model")):
            raise UserError(f"{recipe.name} has nothing to train. Choose a recipe with training")
    argv = ["scaling", *(recipe.name for recipe in recipes), "--processes", processes, "--rounds", rounds]
    with ExitStack() as stack:
        prefixes = stack.enter_context(limited_link(bandwidth)) if bandwidth else []
        runs = [time_recipe(recipe, processes, rounds, seconds, prefixes) for recipe in recipes]
    argv += ["--seconds", f"{seconds:g}", *(["--bandwidth", bandwidth] if bandwidth else [])]
    record = {
        "command": "darkroom " + shlex.join(map(str, argv)),
        "commit": commit(),
        "processes": processes,
        "runs": runs,
    }
    if bandwidth:
        record["link"] = {"bandwidth": bandwidth, **{key: runs[0]["exchange"][key] for key in ("latency", "bytes_per_second")}}
    if write:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(render(record))
    Console().print(Markdown(render(record)))


def time_recipe(
    recipe: Recipe, processes: int, rounds: int, seconds: float, prefixes: Sequence[list[str]] = ()
) -> dict[str, Any]:
    """Return the cost of a recipe's step, and its duration in seconds, one value per interval.

    There are three kinds of intervals: "single", one process; "ddp", several processes that average gradients; "independent",
    as many processes without communication. Each process has the same number of threads in all kinds. With `prefixes` of the
    commands of two processes, there is a fourth kind: "link", two processes in the network namespaces of `limited_link`.
    """
    trial = run_independent(recipe, TRIAL_STEPS, 1, processes)[0]
    steps = min(MAX_STEPS, max(MIN_STEPS, round(seconds / trial["seconds"])))
    spent: dict[str, list[float]] = {"single": [], "ddp": [], "independent": []}
    for i in range(rounds):
        print(f"{recipe.name}: round {i + 1} of {rounds}, intervals of {steps} steps", file=sys.stderr, flush=True)
        spent["single"].append(run_independent(recipe, steps, 1, processes)[0]["seconds"])
        spent["ddp"].append(run_ddp(recipe, steps, processes, trial["batch"])["seconds"])
        if prefixes:
            trial["exchange"] = run_linked(recipe, steps, trial["batch"], prefixes)
            spent.setdefault("link", []).append(trial["exchange"]["seconds"])
        spent["independent"].append(
            statistics.mean(result["seconds"] for result in run_independent(recipe, steps, processes, processes))
        )
    return {"recipe": recipe.name, "steps": steps, **trial, "seconds": spent}


def run_independent(recipe: Recipe, steps: int, count: int, core_groups: int) -> list[dict[str, Any]]:
    """Train in `count` concurrent processes without communication, each on a separate device."""
    with tempfile.TemporaryDirectory() as folder, ending() as processes:
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
    batch_size = ["--data.batch_size", str(batch * processes)]
    with tempfile.TemporaryDirectory() as folder, ending() as running:
        running.append(start([*launcher, *argv, *batch_size], Path(folder), processes))
        return read_result(running[0], recipe)


def run_linked(recipe: Recipe, steps: int, batch: int, prefixes: Sequence[list[str]]) -> dict[str, Any]:
    """Train in two processes that are connected as two machines, with a total batch of twice `batch`."""
    worker = ["-m", "experiments.bench.scaling_worker", str(recipe.path), str(steps), "--trainer.num_nodes", "2"]
    settings = ["--trainer.devices", "1", "--data.batch_size", str(batch * 2)]
    with tempfile.TemporaryDirectory() as folder, ending() as processes:
        for index, prefix in enumerate(prefixes):
            nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(index)]
            launcher = ["-m", "torch.distributed.run", *nodes, "--master-addr", ADDRESSES[0], "--master-port", "29500"]
            processes.append(start([*launcher, *worker, *settings], Path(folder), 2, prefix))
        processes[1].communicate()
        return read_result(processes[0], recipe)


def device_argument(index: int) -> str:
    """Return the value of Lightning's `devices` for one device: the GPU of this index, or one CPU process."""
    import torch

    return f"[{index}]" if torch.cuda.is_available() else "1"


def start(argv: Sequence[str], runs: Path, core_groups: int, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start a Python process whose ranks have 1 / `core_groups` of the CPU cores as threads."""
    threads = str(max(1, (os.cpu_count() or 1) // core_groups))
    environment = {**os.environ, "DARKROOM_RUNS": str(runs), "OMP_NUM_THREADS": threads}
    command = [*prefix, sys.executable, *argv]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def ending() -> Iterator[list[subprocess.Popen[str]]]:
    """Yield a list for processes, and end those that still run at the exit, for example after a signal."""
    processes: list[subprocess.Popen[str]] = []
    try:
        yield processes
    finally:
        running = [process for process in processes if process.returncode is None]
        for process in running:
            process.terminate()
        for process in running:
            process.communicate()


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
