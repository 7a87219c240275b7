"""What training steps do on their device, from torch's profiler: operators, kernels, copies and waits."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import profile, record_function

from experiments.bench.timing import synchronize

STEP = "darkroom/step"  # name of a step in the profile
OPERATOR_SCOPE = 0  # torch's RecordScope::FUNCTION; functions of autograd and marks of users have other scopes
LAUNCH = re.compile(r"(cuda|cu|hip)\w*Launch")  # calls of the driver that start a kernel or a graph of kernels
WAIT = re.compile(r"(cuda|hip)(Stream|Device|Event)Synchronize")
READS = ("aten::_local_scalar_dense", "aten::nonzero")  # operators whose results the host reads: `item`, indices by a mask


@dataclass(frozen=True)
class StepProfile:
    """Means over the profiled steps. On the CPU, operators take the place of kernels. None: unknown on this device.

    Args:
        busy_ms: milliseconds in which the device runs a kernel.
        wall_ms: milliseconds of a step under the profiler, which slows the host down.
        launch_ms: milliseconds of the host from the start of a step until its first kernel is launched.
        operators: operators that Python or the backward pass call.
        kernels: kernels on the GPU.
        copies: copies from the host to the GPU.
        waits: waits of the host for the GPU; on the CPU, operators that read values, which wait if their values are on a GPU.
    """

    busy_ms: float | None
    wall_ms: float
    launch_ms: float | None
    operators: float
    kernels: float | None
    copies: float | None
    waits: float

    def busy_share(self, step_ms: float) -> float | None:
        """Return the share of a step in which the device is busy.

        Args:
            step_ms: milliseconds of a step without the profiler. It does not slow kernels down, but it slows operators down.
        """
        if self.busy_ms is None:
            return None
        return self.busy_ms / (self.wall_ms if self.kernels is None else step_ms)


class StepProfiler:
    """Profile of steps, each between `begin_step` and `end_step`.

    Args:
        device: device of the network.
    """

    def __init__(self, device: torch.device) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library writes to stderr
        self.device = device
        self.profile = profile()

    def start(self) -> None:
        """Start the profile, before the first step."""
        synchronize(self.device)
        self.profile.start()

    def begin_step(self) -> None:
        """Mark the start of a step."""
        self.mark: Any = record_function(STEP)
        self.mark.__enter__()

    def end_step(self) -> None:
        """Mark the end of a step."""
        self.mark.__exit__(None, None, None)

    def stop(self) -> StepProfile:
        """Stop the profile, after the last step."""
        synchronize(self.device)
        self.profile.stop()
        return summarize(self.profile.events(), self.device.type)


def summarize(events: Iterable[Any], device_type: str) -> StepProfile:
    """Return the means over the steps among the events of a profile.

    Args:
        events: events of torch's profiler.
        device_type: type of the network's device, such as "cuda".
    """
    on_host, on_device = [], []
    for event in events:
        if event.device_type == DeviceType.CPU:
            on_host.append(event)
        elif not event.is_user_annotation:
            on_device.append(event)
    steps = [event.time_range for event in on_host if event.name == STEP]
    operators = [event for event in on_host if is_operator(event) and not is_nested(event)]
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    launches = [event for event in on_host if LAUNCH.match(event.name)]
    waits = [event for event in on_host if WAIT.match(event.name)]
    if device_type == "cpu":
        launches, waits = operators, [event for event in on_host if event.name in READS]
    busy = operators if device_type == "cpu" else kernels
    count = len(steps)
    first_launches = [first_start(launches, step.start, step.end) for step in steps]
    delays = [first - step.start for first, step in zip(first_launches, steps, strict=True) if first is not None]
    return StepProfile(
        busy_ms=covered_us([event.time_range for event in busy]) / count / 1000 if busy else None,
        wall_ms=sum(step.end - step.start for step in steps) / count / 1000,
        launch_ms=sum(delays) / len(delays) / 1000 if delays else None,
        operators=len(operators) / count,
        kernels=len(kernels) / count if on_device else None,
        copies=sum(event.name.startswith("Memcpy HtoD") for event in on_device) / count if on_device else None,
        waits=len(waits) / count,
    )


def is_operator(event: Any) -> bool:
    """Return whether an event is a call of an operator, such as aten::add, and not of a function of autograd."""
    return event.scope == OPERATOR_SCOPE and "::" in event.name and not event.name.startswith(("autograd::", "torch::"))


def is_nested(event: Any) -> bool:
    """Return whether another operator has called the operator of an event."""
    parent = event.cpu_parent
    while parent is not None and not is_operator(parent):
        parent = parent.cpu_parent
    return parent is not None


def first_start(events: Iterable[Any], start: float, end: float) -> float | None:
    """Return the earliest start of an event between two times; None if there is none."""
    return min((event.time_range.start for event in events if start <= event.time_range.start < end), default=None)


def covered_us(ranges: Iterable[Any]) -> float:
    """Return the microseconds that time ranges cover together; those covered by several count once."""
    covered, last_end = 0.0, float("-inf")
    for item in sorted(ranges, key=lambda item: item.start):
        covered += max(0.0, item.end - max(item.start, last_end))
        last_end = max(last_end, item.end)
    return covered
