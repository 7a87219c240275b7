"""Exit statuses of a run that has saved its state and stopped, and its request for a requeue."""

import os
from pathlib import Path

PREEMPTED = 85  # after SIGTERM, SIGUSR1 or SIGHUP: the scheduler may requeue
INTERRUPTED = 130  # after Ctrl-C, as in shells
REQUEUE_FILE = "DARKROOM_REQUEUE_FILE"  # environment variable of a job: a file that asks for its requeue


def request_requeue(status: object) -> None:
    """Create the file that asks for a requeue, if a process ends with the status `PREEMPTED` in a job that has such a file."""
    if status == PREEMPTED and (path := os.environ.get(REQUEUE_FILE)):
        Path(path).touch()
