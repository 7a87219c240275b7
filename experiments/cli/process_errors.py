"""Errors of a command: one line, printed once for all its processes."""

import os
import sys
import threading
import time

from datamodules.errors import UserError
from experiments.cli.errors import one_line

PARENT = os.getppid()
RANK_ERROR_DELAY = 8  # seconds that other ranks wait for the exit of rank 0 before they print an error
ORPHAN_GRACE = 30  # seconds between the exit of a rank's parent and the forced exit of the rank


def environment_error(error: OSError | MemoryError | UnicodeError) -> UserError:
    """Describe an error of the machine or of a file's encoding in one line, with the path if it is known."""
    if isinstance(error, MemoryError):
        return UserError(f"not enough memory: {str(error) or 'an allocation failed'}. Use a smaller batch, image or count")
    if isinstance(error, UnicodeError):
        return UserError(f"a name or a file is not UTF-8: {error}. Rename it, or save it as UTF-8")
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename:
        return UserError(f"{error.filename}: {reason}")
    return UserError(f"cannot read or write: {reason}. Check the disks of the output folder and of the redirected output")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of torch means that memory could not be allocated, on the host or on the device."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def report_error(error: UserError) -> None:
    """Report an error once: rank 0 prints it; other ranks print theirs only if rank 0 does not exit."""
    ranks = [os.environ.get(name, "0") for name in ("SLURM_PROCID", "RANK", "LOCAL_RANK")]
    if (rank := next((rank for rank in ranks if rank != "0"), "0")) == "0":
        print(f"darkroom: {one_line(str(error))}", file=sys.stderr)
        return
    deadline = time.monotonic() + RANK_ERROR_DELAY
    while os.getppid() == PARENT and time.monotonic() < deadline:
        time.sleep(0.1)
    if os.getppid() == PARENT:
        print(f"darkroom: rank {rank}: {one_line(str(error))}", file=sys.stderr)


def exit_with_parent() -> None:
    """Start a thread that ends this process `ORPHAN_GRACE` seconds after its parent.

    If rank 0 dies before the ranks are connected, another rank would otherwise wait half an hour for it.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(ORPHAN_GRACE)
        print(f"darkroom: rank {os.environ['LOCAL_RANK']} exits: rank 0 has ended", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
