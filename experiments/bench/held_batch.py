"""A datamodule that yields one batch again and again, on request: the speed of training with data that cost nothing."""

from collections.abc import Iterator
from copy import copy
from typing import Any

from modules.training.phases import Batch


class HeldBatch:
    """Switch between the batches of a datamodule and one prepared batch.

    Args:
        data: datamodule; its training loader and `on_after_batch_transfer` are replaced.

    Attributes:
        batch: prepared batch on the device.
        is_held: whether the loader yields `batch`.
    """

    def __init__(self, data: Any) -> None:
        self.data, self.batch, self.is_held = data, Batch(), False
        self.loader, self.prepare = data.train_dataloader, data.on_after_batch_transfer
        data.train_dataloader = lambda: self
        data.on_after_batch_transfer = lambda batch, index: self.prepare(batch, index) if batch else self.batch

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end; an empty one stands for `batch`."""
        batches = iter(self.loader())
        while True:  # the datamodule's stream has no end
            yield Batch() if self.is_held else next(batches)

    def original(self) -> Any:
        """Return a copy of the datamodule with its own loader."""
        data = copy(self.data)
        del data.train_dataloader, data.on_after_batch_transfer
        return data
