"""`darkroom submit`: write a readable SLURM batch file and submit it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from callbacks.run.exit_codes import PROGRESS_FILE, REQUEUE_FILE
from datamodules.errors import UserError
from experiments.run.config_checks import typed_keys
from experiments.run.lightning_cli import validate_overrides
from experiments.run.paths import runs_root
from experiments.run.recipes import Recipe
from experiments.search.samplers import examples
from experiments.search.spec import read_search

# Time limits of sbatch: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds].
TIME = re.compile(r"UNLIMITED|INFINITE|(\d+|\d+-\d\d?)(:\d\d?){0,2}")
# Options of the Trainer that `submit` sets for a training, and the option to use instead.
MANAGED_KEYS = {
    "trainer.devices": "--gpus or --processes",
    "trainer.num_nodes": "--nodes",
    "trainer.accelerator": "--gpus",
}
FIRST_PORT, N_PORTS = 10_000, 20_000  # of the first processes of jobs
NO_PROGRESS = "no newer checkpoint since the start of this job, so it is not requeued. Use a longer --time or --notice"
SAVING_S = 10  # seconds after the time limit in which a checkpoint counts; SLURM kills the processes after KillWait, 30
# Functions of the batch file; one handles SIGTERM, which SLURM sends at the time limit and when the job is cancelled.
FUNCTIONS = (
    "id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}  # of one task: the last has the id of the array",
    "id=${id:-$SLURM_JOB_ID}",
    "shows() { [[ $(scontrol show job $id) == *$1* ]]; }",
    "preempted() { shows PreemptTime=20; }  # in a year 20..",
    f'saved() {{ [ -e "${PROGRESS_FILE}" ]; }}  # a newer checkpoint, in this job',
    "requeue() {  # a job that would repeat the same work ends",
    "    if saved || preempted; then scontrol requeue $id; return; fi",
    f"    echo 'darkroom: {NO_PROGRESS}' >&2",
    "    status=1",
    "}",
    "ended() {",
    "    trap '' TERM",
    "    if shows Reason=TimeLimit; then  # processes that have not stopped go on in the next job",
    f"        for ((i = 0; i < {SAVING_S}; i++)); do saved && break; sleep 1; done",
    "        requeue",
    "    fi",
    "    wait $step",
    "    exit ${status:-$?}",
    "}",
    "trap ended TERM",
)
FORWARDED_ENV = ("DARKROOM_DATA", "DARKROOM_RUNS", "DARKROOM_CACHE", "WANDB_MODE")  # variables written to the batch file


@dataclass(frozen=True)
class Job:
    """Resources of a SLURM job.

    Args:
        nodes: number of nodes.
        processes: processes per node.
        gpus: GPUs per node; 0 to train on CPUs.
        cores: CPU cores per process.
        time: time limit in SLURM's format; an unfinished job that has saved a newer checkpoint is requeued.
        notice: seconds before the time limit at which SLURM signals the job, which then saves a checkpoint.
        prologue: lines of shell before the command, such as "module load cuda".
        workers: number of jobs in the array, for searches; 0 for a single job.
        options: further options for sbatch, such as "--partition=gpu".
    """

    nodes: int = 1
    processes: int = 1
    gpus: int = 0
    cores: int = 4
    time: str = "24:00:00"
    notice: int = 120
    prologue: Sequence[str] = field(default_factory=tuple)
    workers: int = 0
    options: Sequence[str] = field(default_factory=tuple)


def submit_training(recipe: Recipe, keys: Sequence[str], job: Job, dry_run: bool) -> None:
    """Submit a training that uses all processes of a job, with one GPU each if the job has GPUs.

    Raises:
        UserError: see `submit` and `check_time`; or a key is invalid.
    """
    check_time(job)
    for key in sorted(typed_keys(list(keys)) & MANAGED_KEYS.keys()):
        raise UserError(f"submit: --{key}: set by submit. Use {MANAGED_KEYS[key]}")
    trainer_args = ["--trainer.accelerator", "gpu" if job.gpus else "cpu", "--trainer.devices", str(job.processes)]
    trainer_args += ["--trainer.num_nodes", str(job.nodes)] if job.nodes > 1 else []
    trainer_args += ["--trainer.strategy", "ddp"] if job.processes * job.nodes > 1 else []
    validate_overrides(recipe, list(keys), processes=job.nodes * job.processes, elsewhere=True)
    name = recipe.name if recipe.bundled else str(recipe.path.absolute())
    submit(["fit", name, *trainer_args, *keys], f"darkroom-{recipe.name.replace('/', '-')}", job, dry_run)


def submit_search(path: Path, keys: Sequence[str], job: Job, storage: str | None, dry_run: bool) -> None:
    """Submit the workers of a search as an array of jobs that share a storage; each trial uses all GPUs of its node.

    Raises:
        UserError: see `submit` and `check_time`; or the search or a key is invalid.
    """
    check_time(job)
    search = read_search(path, list(keys))
    if job.nodes > 1:
        raise UserError(f"submit: --nodes {job.nodes}: a trial uses one node. Use --workers for concurrent trials")
    if job.gpus > 1 and "trainer.devices" in typed_keys(list(keys)):
        raise UserError("submit: --trainer.devices: each trial uses the GPUs of its node. Use --gpus")
    if job.processes > max(1, job.gpus):
        raise UserError(f"submit: --processes {job.processes}: not for searches. Use --trainer.devices {job.processes}")
    validate_overrides(search.recipe, *examples(search), processes=max(1, job.gpus), elsewhere=True)
    arguments = ["--storage", storage] if storage else []
    arguments += ["--trainer.devices", str(job.gpus)] if job.gpus > 1 else []
    worker_job = replace(job, processes=1, cores=job.cores * max(1, job.gpus), workers=max(1, job.workers))
    submit(["sweep", str(path.absolute()), *arguments, *keys], f"darkroom-search-{search.name}", worker_job, dry_run)


def check_time(job: Job) -> None:
    """Refuse a time limit that sbatch would refuse.

    Raises:
        UserError: it is not a time limit.
    """
    if not TIME.fullmatch(job.time):
        raise UserError(f"submit: --time {job.time}: not a time limit. Use a time such as 24:00:00 or 2-12:00:00")


def submit(command: Sequence[str], name: str, job: Job, dry_run: bool) -> None:
    """Write the batch file to the folder of runs and submit it with `sbatch`, or print it.

    Args:
        command: arguments of `python -m experiments` in each process.
        name: name of the job.
        job: resources of the job.
        dry_run: only print the file.

    Raises:
        UserError: `sbatch` is not installed or rejected the job.
    """
    folder = runs_root().absolute() / "slurm"
    text = batch_file(command, name, job, folder)
    if dry_run:
        print(text, end="")
        return
    if shutil.which("sbatch") is None:
        raise UserError("submit: sbatch is not installed. Use --dry-run to print the file, and submit it on the cluster")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{time.strftime('%Y-%m-%d_%H-%M-%S')}.sh"
    path.write_text(text)
    result = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"sbatch: {' '.join(result.stderr.split())}  ({path})")
    job_id = result.stdout.strip().partition(";")[0]
    print(f"submitted {job_id}  ({path})")
    print(f"log       {folder / f'{name}-{job_id}.log'}" if not job.workers else f"logs      {folder}/{name}-{job_id}_*.log")


def batch_file(command: Sequence[str], name: str, job: Job, folder: Path) -> str:
    """Return the batch file.

    A job that receives the signal saves a checkpoint and is requeued; the same command resumes the run. The first process
    writes a file that asks for the requeue, because the status of the job can be that of another process: if one process ends
    with an error, SLURM ends the others, which would otherwise wait for it. Without that file, the job is requeued only if
    SLURM itself has ended it: at its time limit, where SLURM signals this script, too, or for a job of higher priority.

    A job is not requeued if it has saved no newer checkpoint since its start, because the next one would repeat its work and
    end in the same way; the first process writes a file that says so. A preempted job is requeued in any case: a job of higher
    priority can come at any time, and the next start has its full time again.

    Lightning takes the port of the first process from the last four digits of the job's id, so that jobs of a node can have the
    same one. Here, it follows from the whole id, which each task of an array has for itself, below Linux' ephemeral ports; this
    script runs on the node of the first process, and leaves out ports on which a program listens there.
    """
    requests_gpus = any(option.startswith(("--gres", "--gpus")) for option in job.options)
    directives = {
        "job-name": name,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes,
        **({"gpus-per-node": job.gpus} if job.gpus and not requests_gpus else {}),
        "cpus-per-task": job.cores,
        "time": job.time,
        "signal": f"USR1@{job.notice}",
        "open-mode": "append",
        "output": folder / f"{name}-{'%A_%a' if job.workers else '%j'}.log",
        **({"array": f"0-{job.workers - 1}"} if job.workers else {}),
    }
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in directives.items()),
        "#SBATCH --requeue",
    ]
    lines += [f"#SBATCH {option}" for option in job.options]
    lines += ["", f"cd {shlex.quote(str(Path.cwd()))}"]
    lines += [f"export {key}={shlex.quote(os.environ[key])}" for key in FORWARDED_ENV if key in os.environ]
    lines += [
        f"export OMP_NUM_THREADS={job.cores}",
        f"export SRUN_CPUS_PER_TASK={job.cores}  # srun does not read --cpus-per-task since SLURM 22.05",
        f"export {REQUEUE_FILE}={shlex.quote(str(folder))}/requeue-$SLURM_JOB_ID",
        f"export {PROGRESS_FILE}={shlex.quote(str(folder))}/progress-$SLURM_JOB_ID",
        f"export MASTER_PORT=$(({FIRST_PORT} + SLURM_JOB_ID % {N_PORTS}))",
        "while (: < /dev/tcp/127.0.0.1/$MASTER_PORT) 2> /dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done  # in use",
        *job.prologue,
        "",
        *FUNCTIONS,
        f"""trap 'rm -f "${REQUEUE_FILE}" "${PROGRESS_FILE}"' EXIT""",
        f'rm -f "${REQUEUE_FILE}" "${PROGRESS_FILE}"',
        f"srun --kill-on-bad-exit=1 {shlex.join([sys.executable, '-m', 'experiments', *command])} &",
        "step=$!",
        "wait $step",
        "status=$?",
        f'if [ -e "${REQUEUE_FILE}" ]; then requeue  # stopped by a signal',
        "elif [ $status != 0 ] && preempted; then requeue; fi",
        "exit $status",
    ]
    return "\n".join(lines) + "\n"
