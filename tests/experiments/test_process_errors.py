"""Errors of the machine: a full disk, too little memory, a missing file, a name that is not UTF-8."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import ROOT
from experiments.cli import main as command_line
from experiments.cli.main import main


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_full_disk_is_reported_in_one_line():
    command = [sys.executable, "-m", "experiments", "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "darkroom: cannot read or write: No space left on device. "
        "Check the disks of the output folder and of the redirected output\n"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/mnt/run/a.png"), "/mnt/run/a.png: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "data"), "data: Permission denied"),
        (
            TimeoutError(),
            "cannot read or write: TimeoutError. Check the disks of the output folder and of the redirected output",
        ),
        (MemoryError(), "not enough memory: an allocation failed. Use a smaller batch, image or count"),
        (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"), "a name or a file is not UTF-8"),
    ],
)
def test_error_of_the_machine_is_one_line(monkeypatch, capsys, error, line):
    def fail(argv):
        raise error

    monkeypatch.setitem(command_line.COMMANDS, "list", fail)
    assert main(["list"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"darkroom: {line}")
    assert printed.count("\n") == 1


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(argv):
        raise AssertionError("a fault of the program")

    monkeypatch.setitem(command_line.COMMANDS, "list", fail)
    with pytest.raises(AssertionError, match="a fault of the program"):
        main(["list"])
