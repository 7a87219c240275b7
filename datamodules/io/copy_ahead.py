"""Copies of training batches to a GPU while it computes."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

AHEAD = 2  # batches


class CopyAhead:
    """Loader whose batches are copied to a device two batches ahead, on another stream than the training.

    Args:
        loader: loader of batches in page-locked memory.
        device: device of the batches that this loader yields.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.target = loader, device

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches; the current stream waits until a batch has arrived, the CPU does not wait."""
        streams = torch.get_device_module(self.target)
        copies = streams.Stream()
        started: deque[tuple[Any, Any]] = deque()  # batches, with the ends of their copies

        def arrived() -> Any:
            batch, end = started.popleft()
            training = streams.current_stream()
            training.wait_event(end)
            if self.target.type != "cpu":  # their memory is not used again before the work that is now in this stream
                apply_to_collection(batch, Tensor, lambda tensor: tensor.record_stream(training))
            return batch

        for batch in self.loader:
            with streams.stream(copies):
                started.append((move_data_to_device(batch, self.target), copies.record_event()))
            if len(started) > AHEAD:
                yield arrived()
        while started:
            yield arrived()
