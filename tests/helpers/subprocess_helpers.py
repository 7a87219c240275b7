"""Runs in a process of their own, forked from a server that has imported everything and computed nothing.

A SIGKILL kills only them, they start at once, and torch's threads (which a fork does not survive) are not there yet.
"""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from experiments import ROOT

SERVER = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the server, once for all tests."""
    SERVER.set_forkserver_preload(["tests.helpers.forkserver_preload"])
    with contextlib.chdir(ROOT):  # where it finds that module
        forkserver.ensure_running()


def forked(action: Callable[..., Any], *args: Any, output: Path | None = None) -> int:
    """Call a function of a module in a child process, in this one's folder and environment.

    Args:
        action: returns nothing or its exit status.
        args: its arguments.
        output: file for what it prints; else that is printed here, when it has ended.

    Returns:
        Its exit status (negative: killed by that signal).
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [output or Path(folder, name) for name in ("stdout", "stderr")]
        process = started(streams, action, *args)
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{action} took more than five minutes")
        if output is None:
            for stream, name in zip((sys.stdout, sys.stderr), streams, strict=True):
                stream.flush()
                os.write(1 if stream is sys.stdout else 2, name.read_bytes())
    return process.exitcode


def two_forked(action: Callable[..., Any], *args: Any) -> tuple[list[int | None], str]:
    """The same in two processes that know of each other, by the variables that Lightning gives the ones it launches.

    Returns:
        Their exit statuses, and what they have said on stderr.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
        said = [Path(folder, f"stderr-{rank}") for rank in range(2)]
        pair = [
            started([Path(folder, "stdout"), said[rank]], action, *args, **shared, LOCAL_RANK=str(rank)) for rank in range(2)
        ]
        for process in pair:
            process.join(timeout=300)
            process.kill()
            process.join()
        return [process.exitcode for process in pair], "".join(stream.read_text() for stream in said)


def started(streams: Sequence[Path], action: Callable[..., Any], *args: Any, **variables: str) -> BaseProcess:
    """The same without waiting for its end; it prints to two files, and finds these variables in its environment."""
    names = [str(stream) for stream in streams]
    process = SERVER.Process(target=_child, args=(action, args, names, str(Path.cwd()), {**os.environ, **variables}))
    process.start()
    return process


def _child(action: Callable[..., Any], args: Any, streams: list[str], folder: str, environment: dict[str, str]) -> None:
    for number, name in enumerate(streams, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("DARKROOM_RUN_FOLDER", None)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a run of its own
    sys.exit(action(*args))


def launched(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A darkroom command in a process of its own, which may launch others."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
