"""Copies of training batches to a GPU while it computes."""

from collections import deque
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

AHEAD = 2  # batches


def copies_ahead(device: torch.device) -> bool:
    """Return whether batches are copied ahead to a device: a GPU."""
    return device.type == "cuda"


class CopyAhead(DataLoader[Any]):
    """DataLoader whose batches are copied to a device two batches ahead, on another stream than the training.

    Args:
        dataset: dataset to load from.
        target: device of the batches.
        settings: other arguments of `DataLoader`; `pin_memory` is needed for copies during the training.
    """

    def __init__(self, dataset: Any, target: torch.device, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.target = target

    def __iter__(self) -> Any:
        """Yield the batches. The current stream waits until a batch has arrived, the CPU does not wait."""
        streams = torch.get_device_module(self.target)
        copies = torch.cuda.Stream(self.target) if self.target.type == "cuda" else streams.Stream()  # torch.cpu's has no device
        started: deque[tuple[Any, Any]] = deque()  # batches, with the ends of their copies

        def arrived() -> Any:
            batch, end = started.popleft()
            training = streams.current_stream(self.target)
            training.wait_event(end)
            if self.target.type != "cpu":  # their memory is not used again before the work that is now in this stream
                apply_to_collection(batch, Tensor, lambda tensor: tensor.record_stream(training))
            return batch

        for batch in super().__iter__():
            with streams.stream(copies):
                started.append((move_data_to_device(batch, self.target), copies.record_event()))
            if len(started) > AHEAD:
                yield arrived()
        while started:
            yield arrived()
