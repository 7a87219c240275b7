"""Two network namespaces on this machine, connected by a link of limited bandwidth, for `darkroom scaling --bandwidth`."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from datamodules.errors import UserError

INTERFACE = "link0"  # in both namespaces
ADDRESSES = ("10.77.0.1", "10.77.0.2")
QUEUE = ("burst", "128kb", "latency", "50ms")  # of the token bucket filter, which has no delay of its own


@contextmanager
def limited_link(bandwidth: str) -> Iterator[list[list[str]]]:
    """Create two namespaces with a virtual interface each, which a token bucket filter limits (tc-tbf), and remove them.

    SIGTERM ends the process as Ctrl-C does, so that they are removed then, too; those of a killed process are removed here.

    Args:
        bandwidth: rate of each direction in tc's notation, such as "1gbit".

    Yields:
        For each namespace, the words that must precede a command to run it there.

    Raises:
        UserError: this is not Linux, the user is not root, a program is missing, or the rate is invalid.
    """
    if missing := [program for program in ("ip", "tc") if not shutil.which(program)]:
        raise UserError(f"scaling: --bandwidth: no program {missing[0]}. Install iproute2 (Linux)")
    if os.geteuid():
        raise UserError("scaling: --bandwidth: network namespaces need root. Run the command with sudo, or without --bandwidth")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?[kmgt]?bit", bandwidth):
        raise UserError(f"scaling: --bandwidth {bandwidth}: not a rate of tc. Use a value such as 1gbit or 100mbit")
    own = os.getpid()
    remove(name for name, process in list_namespaces().items() if process == own or not Path(f"/proc/{process}").exists())
    names = [f"darkroom{own}{side}" for side in "ab"]
    handler = signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        for name in names:
            call("ip", "netns", "add", name)
        first, second = (["name", INTERFACE, "netns", name] for name in names)
        call("ip", "link", "add", *first, "type", "veth", "peer", *second)
        for name, address in zip(names, ADDRESSES, strict=True):
            call("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                call("ip", "-n", name, "link", "set", device, "up")
            call("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", "rate", bandwidth, *QUEUE)
        variables = [f"GLOO_SOCKET_IFNAME={INTERFACE}", f"NCCL_SOCKET_IFNAME={INTERFACE}"]
        yield [["ip", "netns", "exec", name, "env", *variables] for name in names]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        remove(names)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, handler)


def list_namespaces() -> dict[str, int]:
    """Return the process ids of the namespaces of `limited_link` by name."""
    names = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True, text=True).stdout
    return {match[0]: int(match[1]) for match in re.finditer(r"^darkroom(\d+)[ab]\b", names, re.MULTILINE)}


def remove(names: Iterable[str]) -> None:
    """Remove namespaces; their interfaces disappear with them."""
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal: end the process, with the status that a shell gives it."""
    raise SystemExit(128 + number)


def call(*command: str) -> None:
    """Run a program.

    Raises:
        UserError: it failed; the message contains its output.
    """
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"scaling: --bandwidth: {' '.join(command)}: {result.stderr.strip()}")
