"""`darkroom submit`: a batch file for SLURM that a person can read, and its submission."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from callbacks.run.exit_codes import PREEMPTED
from datamodules.errors import UserError
from experiments.run.lightning_cli import check_keys
from experiments.run.recipes import Recipe
from experiments.run.run_dir import runs_root
from experiments.search.spec import read_search

WARNING = 120  # seconds before the end of a job's time at which SLURM tells it
KEPT = ("DARKROOM_DATA", "DARKROOM_RUNS", "DARKROOM_CACHE", "WANDB_MODE")  # of the environment, written into the file


@dataclass(frozen=True)
class Job:
    """What a job asks the cluster for.

    Args:
        nodes: how many.
        processes: on each node.
        gpus: of each node; none to compute on processors.
        cores: of each process.
        time: at most, as SLURM writes it; the job goes on in another one.
        workers: jobs of an array, for searches.
        options: words for SLURM, as they stand: "--partition=gpu".
    """

    nodes: int = 1
    processes: int = 1
    gpus: int = 0
    cores: int = 4
    time: str = "24:00:00"
    workers: int = 0
    options: Sequence[str] = field(default_factory=tuple)


def submit_training(recipe: Recipe, keys: Sequence[str], job: Job, dry_run: bool) -> None:
    """A training on all the processes of a job, a GPU each where there are any.

    Raises:
        Refused: see `submit`; or a key is wrong.
    """
    devices = ["--trainer.accelerator", "gpu" if job.gpus else "cpu", "--trainer.devices", str(job.processes)]
    devices += ["--trainer.num_nodes", str(job.nodes)] if job.nodes > 1 else []
    devices += ["--trainer.strategy", "ddp"] if job.processes * job.nodes > 1 else []
    check_keys(recipe, list(keys))
    name = recipe.name if recipe.shipped else str(recipe.path.absolute())
    submit(["fit", name, *devices, *keys], f"darkroom-{recipe.name.replace('/', '-')}", job, dry_run)


def submit_search(path: Path, keys: Sequence[str], job: Job, dry_run: bool) -> None:
    """Workers on a search, each a job of an array, with all the GPUs of its node for a trial.

    Raises:
        Refused: see `submit`; or the search or a key is wrong.
    """
    search = read_search(path, list(keys))
    if job.nodes > 1:
        raise UserError("submit: a trial has one node; --workers is how many of them work at once")
    check_keys(search.recipe, search.example)
    devices = ["--trainer.devices", str(job.gpus)] if job.gpus > 1 else []
    alone = replace(job, processes=1, cores=job.cores * max(1, job.gpus), workers=max(1, job.workers))
    submit(["sweep", str(path.absolute()), *devices, *keys], f"darkroom-search-{search.name}", alone, dry_run)


def submit(command: Sequence[str], name: str, job: Job, dry_run: bool) -> None:
    """Write the batch file below the folder of runs, and hand it to `sbatch`; or print it.

    Args:
        command: what each process runs, behind `python -m experiments`.
        name: of the job.
        job: what it asks for.
        dry_run: print the file, and do nothing else.

    Raises:
        Refused: there is no `sbatch` here, or it refuses the job.
    """
    folder = runs_root().absolute() / "slurm"
    text = batch_file(command, name, job, folder)
    if dry_run:
        print(text, end="")
        return
    if shutil.which("sbatch") is None:
        raise UserError("submit: no sbatch here; --dry-run prints the file, which a machine of the cluster takes")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{time.strftime('%Y-%m-%d_%H-%M-%S')}.sh"
    path.write_text(text)
    answer = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"sbatch: {' '.join(answer.stderr.split())}  ({path})")
    number = answer.stdout.strip().partition(";")[0]
    print(f"submitted {number}  ({path})")
    print(f"log       {folder / f'{name}-{number}.log'}" if not job.workers else f"logs      {folder}/{name}-{number}_*.log")


def batch_file(command: Sequence[str], name: str, job: Job, folder: Path) -> str:
    """The batch file.

    A job that is told to stop saves, ends with status 85, and is put into the queue again: it goes on by the same command.
    """
    asks = {
        "job-name": name,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes,
        **({"gpus-per-node": job.gpus} if job.gpus else {}),
        "cpus-per-task": job.cores,
        "time": job.time,
        "signal": f"USR1@{WARNING}",
        "open-mode": "append",
        "output": folder / f"{name}-{'%A_%a' if job.workers else '%j'}.log",
        **({"array": f"0-{job.workers - 1}"} if job.workers else {}),
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{key}={value}" for key, value in asks.items()), "#SBATCH --requeue"]
    lines += [f"#SBATCH {option}" for option in job.options]
    lines += ["", f"cd {shlex.quote(str(Path.cwd()))}"]
    lines += [f"export {key}={shlex.quote(os.environ[key])}" for key in KEPT if key in os.environ]
    lines += [
        f"export OMP_NUM_THREADS={job.cores}",
        "",
        f"srun {shlex.join([sys.executable, '-m', 'experiments', *command])}",
        "status=$?",
        f"if [ $status = {PREEMPTED} ]; then scontrol requeue $SLURM_JOB_ID; fi  # it has saved, and goes on by itself",
        "exit $status",
    ]
    return "\n".join(lines) + "\n"
