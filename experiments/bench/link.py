"""Two network namespaces on this machine, connected by a link of limited bandwidth, for `darkroom scaling --bandwidth`."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from datamodules.errors import UserError

ADDRESSES = ("10.77.0.1", "10.77.0.2")
QUEUE = ("burst", "128kb", "latency", "50ms")  # of the token bucket filter, which has no delay of its own


@contextmanager
def limited_link(bandwidth: str) -> Iterator[list[list[str]]]:
    """Create two namespaces with a virtual interface each, which a token bucket filter limits (tc-tbf), and remove them.

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
    names = [f"darkroom{os.getpid()}{side}" for side in "ab"]
    interfaces = [f"dr{os.getpid() % 10**6}{side}" for side in "ab"]
    try:
        for name in names:
            call("ip", "netns", "add", name)
        call("ip", "link", "add", interfaces[0], "type", "veth", "peer", "name", interfaces[1])
        for name, interface, address in zip(names, interfaces, ADDRESSES, strict=True):
            call("ip", "link", "set", interface, "netns", name)
            call("ip", "-n", name, "address", "add", f"{address}/24", "dev", interface)
            for device in ("lo", interface):
                call("ip", "-n", name, "link", "set", device, "up")
            call("tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", "rate", bandwidth, *QUEUE)
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={interface}", f"NCCL_SOCKET_IFNAME={interface}"]
            for name, interface in zip(names, interfaces, strict=True)
        ]
    finally:
        for name in names:  # the interfaces disappear with them
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def call(*command: str) -> None:
    """Run a program.

    Raises:
        UserError: it failed; the message contains its output.
    """
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"scaling: --bandwidth: {' '.join(command)}: {result.stderr.strip()}")
