"""Data parallelism for manual optimization: every rank holds the full weights, the method averages the gradients."""

from collections.abc import Sized
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.utils.data import DataLoader


class ManualDDPStrategy(DDPStrategy):
    """Several processes that begin with the same weights; the method itself averages the gradients of its steps.

    Lightning's DDP wraps the module and expects every backward pass to reach every parameter: with networks that alternate
    it must send each gradient twice. Registered as "ddp", which is what Lightning takes for more than one device.
    """

    def configure_ddp(self) -> None:
        """Give every process the weights and buffers of the first, and wrap nothing."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Let a process that got nothing to measure, of fewer items than processes, measure one that another has too.

        A loop without a batch is skipped, with its hooks: the others would wait for this process for ever. Measures count
        pictures by their names, and so once.
        """
        if not isinstance(dataloader.sampler, Sized) or len(dataloader) or not len(dataloader.dataset):
            return dataloader
        return DataLoader(dataloader.dataset, sampler=[self.global_rank % len(dataloader.dataset)], batch_size=None)


StrategyRegistry.register("ddp", ManualDDPStrategy, override=True)
