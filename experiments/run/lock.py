"""The lock of a run's folder: one process at a time trains a run."""

import os
import re
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from datamodules.errors import UserError

SLURM_WAIT_S = 180  # a server of a network disk frees the lock of a node that has died after about 90 seconds
POLL_S = 1.0
SCONTROL_S = 30  # in which SLURM says whether a job runs
RUNNING_STATES = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "STAGE_OUT", "SIGNALING", "RESIZING")


class RunInUse(UserError):
    """Another process holds the lock of a run."""


@contextmanager
def locked(folder: Path, wait_s: float | None = None) -> Iterator[None]:
    """Lock a run's folder against other processes; a file next to the lock says which process holds it.

    On a disk without `flock`, the lock is a file that remains if its process is killed on another machine. It is removed if
    SLURM says that the job of that process has ended.

    Args:
        folder: folder of the run.
        wait_s: seconds to wait for the lock; by default `SLURM_WAIT_S` in a SLURM job, 0 elsewhere.

    Raises:
        RunInUse: another process holds the lock.
    """
    if wait_s is None:
        wait_s = SLURM_WAIT_S if "SLURM_JOB_ID" in os.environ else 0
    lock, holder_file = FileLock(folder / ".lock"), folder / ".lock-holder"
    deadline, is_told = time.monotonic() + wait_s, False
    while True:
        try:
            with warnings.catch_warnings(action="ignore"):  # that there is no flock
                lock.acquire(blocking=False)
            break
        except Timeout:
            holder = read_holder(holder_file)
            if isinstance(lock, SoftFileLock) and has_ended(holder):
                if read_holder(holder_file) == holder:  # no other process has taken it in the meantime
                    holder_file.unlink(missing_ok=True)
                    (folder / ".lock").unlink(missing_ok=True)
                continue
            if time.monotonic() >= deadline:
                remedy = f", or remove {folder / '.lock'} if it has ended" if isinstance(lock, SoftFileLock) else ""
                raise RunInUse(f"run '{folder.name}' is in use by {holder}. Choose another --run{remedy}") from None
            if not is_told:
                print(f"waiting   for run '{folder.name}', in use by {holder}", flush=True)
            is_told = True
            time.sleep(POLL_S)
    try:
        holder_file.write_text(describe_process())
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()


def read_holder(path: Path) -> str:
    """Return the process that holds a lock, see `describe_process`."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return "another process"


def describe_process() -> str:
    """Return the identity of this process: its id, its machine, and in a SLURM job the job and its number of restarts."""
    text = f"another process ({os.getpid()} on {socket.gethostname()}"
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # the last task has the id of the array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job:
        text += f", job {job}, restart {os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return f"{text})"


def has_ended(holder: str) -> bool:
    """Return whether the SLURM job of a process has ended or was restarted; False if SLURM does not say so.

    Args:
        holder: the process, see `describe_process`.
    """
    if not (job := re.search(r"job (\d+(?:_\d+)?), restart (\d+)\)", holder)):
        return False
    try:
        shown = subprocess.run(["scontrol", "show", "job", job[1]], capture_output=True, text=True, timeout=SCONTROL_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if shown.returncode:
        return "Invalid job id" in shown.stderr
    fields = dict(re.findall(r"(JobState|Restarts)=(\w+)", shown.stdout))
    return fields["JobState"] not in RUNNING_STATES or int(fields["Restarts"]) > int(job[2])
