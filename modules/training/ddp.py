"""Data-parallel strategy for manual optimization."""

from collections.abc import Sized
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.utils.data import DataLoader


class ManualDDPStrategy(DDPStrategy):
    """DDP without gradient hooks: ranks start from the same weights, and `Method` averages the gradients of each update.

    Lightning's DDP wraps the module and expects every backward pass to reach every parameter. With alternating networks it
    would reduce each gradient twice. Registered as "ddp", Lightning's default for more than one device.
    """

    def configure_ddp(self) -> None:
        """Broadcast the weights and buffers of rank 0, without wrapping the module."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Give idle ranks a duplicate item so that every rank runs the loop.

        Lightning skips a loop without batches, including its hooks, and the other ranks would wait forever. Metrics count
        images by name, so a duplicate counts once.
        """
        if not isinstance(dataloader.sampler, Sized) or len(dataloader) or not len(dataloader.dataset):
            return dataloader
        return DataLoader(dataloader.dataset, sampler=[self.global_rank % len(dataloader.dataset)], batch_size=None)


StrategyRegistry.register("ddp", ManualDDPStrategy, override=True)
