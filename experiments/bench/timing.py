"""Timing and counting for `darkroom bench`."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Milliseconds of work on a device: between two events of its stream on CUDA, by the wall clock on other devices.

    Args:
        device: device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []

    def start(self) -> None:
        """Start when the device has finished its queued work."""
        synchronize(self.device)
        self.started = time.perf_counter()
        if self.events:
            self.events[0].record(torch.cuda.current_stream(self.device))

    def stop(self) -> float:
        """Return the milliseconds until the device has finished the work since `start`."""
        if self.events:
            self.events[1].record(torch.cuda.current_stream(self.device))
        synchronize(self.device)
        return self.events[0].elapsed_time(self.events[1]) if self.events else 1000 * (time.perf_counter() - self.started)


def quartiles(values: list[float]) -> list[float]:
    """Return the lower and the upper quartile; a single value is returned as both."""
    if len(values) < 2:
        return values * 2
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def count_flops(function: Callable[[], Any]) -> int:
    """Return the floating-point operations of a call, counted by torch's `FlopCounterMode`."""
    counter: Any = FlopCounterMode(display=False)
    # Its counts by module fail with torch.autograd.grad, which gradient penalties use; only the total is needed.
    counter.mod_tracker = SimpleNamespace(parents={"Global"}, __enter__=lambda: None, __exit__=lambda: None)
    with counter, torch.compiler.set_stance("force_eager"):  # the counter does not see the operations of compiled code
        function()
    return counter.get_total_flops()


def matmul_gflops(device: torch.device, precision: Callable[[], AbstractContextManager[Any]]) -> float:
    """Return the GFLOP/s of the fastest of five products of two large square matrices.

    Args:
        device: device of the matrices.
        precision: context of the product, such as autocast; the matrices have the dtype of its results.
    """
    side = 512 if device.type == "cpu" else 8192  # a CPU without 16-bit arithmetic is slow
    with torch.no_grad(), precision():
        factors = torch.rand(2, side, side, device=device)
        a, b = factors.to((factors[0, :1] @ factors[1, :, :1]).dtype)
        watch, times = Stopwatch(device), []
        for _ in range(6):  # the first one is a warm-up
            watch.start()
            a @ b
            times.append(watch.stop())
    return 2 * side**3 / min(times[1:]) / 1e6


def median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the median duration in seconds of five calls without gradients, after one warm-up call.

    Args:
        function: work on the device; its duration includes all that it queues there.
        device: device of the work, see `Stopwatch`.
    """
    watch, milliseconds = Stopwatch(device), []
    with torch.no_grad():
        for _ in range(6):
            watch.start()
            function()
            milliseconds.append(watch.stop())
    return statistics.median(milliseconds[1:]) / 1000
