"""Signals of a scheduler before those that `Preemption` handles: during imports and the preparation of data."""

import os
import signal
import threading
from types import FrameType
from typing import NoReturn

from callbacks.run.exit_codes import PREEMPTED

_noted: list[int] = []  # received by this process


def handle_early_signals() -> None:
    """Handle SIGTERM and SIGUSR1; call it at the start of a process.

    The only process of a run exits at once with the status `PREEMPTED`, because there is nothing to save. One of several
    processes notes SIGUSR1, and all stop together after the first steps. SIGTERM ends it: SLURM also sends
    SIGTERM when another process has failed, and such a job must not be requeued.
    """
    if threading.current_thread() is not threading.main_thread():  # other threads cannot handle signals
        return
    if any(int(os.environ.get(name, "1")) > 1 for name in ("SLURM_NTASKS", "WORLD_SIZE")):
        signal.signal(signal.SIGUSR1, _note)
        return
    signal.signal(signal.SIGUSR1, _exit)
    signal.signal(signal.SIGTERM, _exit)


def early_status() -> int:
    """Return `PREEMPTED` if a signal was received, 0 otherwise."""
    return PREEMPTED if _noted else 0


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(number)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    _noted.append(number)  # the exception is lost within a destructor; the run then stops before its first step
    os.write(2, f"darkroom: stopped by {signal.Signals(number).name}\n".encode())
    raise SystemExit(PREEMPTED)
