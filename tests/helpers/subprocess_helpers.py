"""Functions in child processes, forked from a server that has imported all modules but has computed nothing.

SIGKILL ends only the child. Children start without imports. The server has no torch threads, which a fork would lose.
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
    with contextlib.chdir(ROOT):  # to import that module
        forkserver.ensure_running()


def forked(action: Callable[..., Any], *args: Any, output: Path | None = None) -> int:
    """Call a function of a module in a child process, with the working directory and environment of this process.

    Args:
        action: function that returns None or an exit status.
        args: its arguments.
        output: file for its output; by default this process prints it after the child has exited.

    Returns:
        The exit status, or the negative number of the signal that killed the child.

    Raises:
        TimeoutError: the child has not exited after five minutes.
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


def refused(capfd: Any, *words: str) -> str:
    """Run a command that must fail with one line, and return the line."""
    from experiments.cli.main import main

    capfd.readouterr()
    assert forked(main, [*words]) == 2
    error: str = capfd.readouterr().err
    assert error.startswith("darkroom: ")
    assert error.count("\n") == 1
    return error


def two_forked(action: Callable[..., Any], *args: Any) -> tuple[list[int | None], str]:
    """Call `forked` for two ranks, with the environment variables that Lightning sets for the processes it launches.

    Returns:
        The exit statuses, and the output of both ranks.
    """
    with socket.socket() as port_socket, tempfile.TemporaryDirectory() as folder:
        port_socket.bind(("127.0.0.1", 0))
        port = str(port_socket.getsockname()[1])
        port_socket.close()
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
        output = Path(folder, "output")
        processes = [started([output, output], action, *args, **shared, LOCAL_RANK=str(rank)) for rank in range(2)]
        for process in processes:
            process.join(timeout=300)
            process.kill()
            process.join()
        return [process.exitcode for process in processes], output.read_text()


def assert_on_two_ranks(action: Callable[[int], None]) -> None:
    """Call a function of a module, with the rank, in two processes of one process group; its assertions must hold in both."""
    statuses, output = two_forked(_in_group, action)
    assert statuses == [0, 0], output


def _in_group(action: Callable[[int], None]) -> None:
    import torch.distributed as dist

    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    action(rank)
    dist.destroy_process_group()


def started(streams: Sequence[Path], action: Callable[..., Any], *args: Any, **variables: str) -> BaseProcess:
    """Start a child process without waiting for it. It prints to two files. `variables` extend its environment."""
    names = [str(stream) for stream in streams]
    process = SERVER.Process(target=_child, args=(action, args, names, str(Path.cwd()), {**os.environ, **variables}))
    process.start()
    return process


def _child(action: Callable[..., Any], args: Any, streams: list[str], folder: str, environment: dict[str, str]) -> None:
    for descriptor, name in enumerate(streams, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("DARKROOM_RUN_FOLDER", None)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a separate program
    sys.exit(action(*args))


def launched(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a darkroom command as a separate program, which may launch others."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
