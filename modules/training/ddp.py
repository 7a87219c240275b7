"""Data-parallel strategy for manual optimization."""

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry


class ManualDDPStrategy(DDPStrategy):
    """DDP without gradient hooks: ranks start from the same weights, and `Method` averages the gradients of each update.

    Lightning's DDP wraps the module and expects every backward pass to reach every parameter. With alternating networks it
    would reduce each gradient twice. This strategy is registered as "ddp", Lightning's default for more than one device.
    """

    def configure_ddp(self) -> None:
        """Broadcast the weights and buffers of rank 0, without wrapping the module."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, src=0)


StrategyRegistry.register("ddp", ManualDDPStrategy, override=True)
