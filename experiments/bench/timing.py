"""Timing and counting for `darkroom bench`."""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    with counter:
        function()
    return counter.get_total_flops()


def median_seconds(function: Callable[[], Any]) -> float:
    """Return the median duration in seconds of five calls without gradients, after one warm-up call."""
    times = []
    with torch.no_grad():
        for _ in range(6):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
