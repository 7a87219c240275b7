"""Exit statuses of a run that has saved its state and stopped, its request for a requeue, and its progress."""

import os
from pathlib import Path

PREEMPTED = 85  # after SIGTERM, SIGUSR1 or SIGHUP: the scheduler may requeue
INTERRUPTED = 130  # after Ctrl-C, as in shells
# Environment variables of a job: a file that asks for its requeue, and one that says that it has saved a newer checkpoint than
# that with which it has started. Without the second one, each requeue would repeat the same work.
REQUEUE_FILE, PROGRESS_FILE = "DARKROOM_REQUEUE_FILE", "DARKROOM_PROGRESS_FILE"


def request_requeue(status: object) -> None:
    """Create the file that asks for a requeue, if a process ends with the status `PREEMPTED` in a job that has such a file."""
    if status == PREEMPTED and (path := os.environ.get(REQUEUE_FILE)):
        Path(path).touch()


def note_progress() -> None:
    """Create the file that says that a newer checkpoint is saved, in a job that has such a file."""
    if path := os.environ.get(PROGRESS_FILE):
        Path(path).touch()
