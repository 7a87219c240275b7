"""Networks whose weights, gradients and optimizer states are divided among the processes (FSDP2)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from datamodules.errors import UserError
from modules.training.ddp import ManualDDPStrategy
from modules.training.ema import EMA


class FSDP2Strategy(ManualDDPStrategy):
    """Each network is a unit: whole while it computes, divided otherwise. Registered as "fsdp2".

    Checkpoints are those of "ddp", with whole weights and states: a run may go on under either. Lightning's own strategy for
    FSDP2 divides by nothing unless it is told the sizes, and its "fsdp" cannot train networks that alternate.
    """

    def configure_ddp(self) -> None:
        """Begin with the first process's weights, and divide them.

        Networks under a gradient penalty stay whole, as under "ddp": torch frees a divided weight after the first of the two
        backward passes.
        """
        super().configure_ddp()
        method: Any = self.lightning_module
        mesh = init_device_mesh(self.root_device.type, (dist.get_world_size(),))
        for network in shardable_modules(method, method.double_backward_networks):
            network.to(memory_format=torch.contiguous_format)  # torch divides no weights that lie otherwise
            fully_shard(network, mesh=mesh, reshard_after_forward=False)

    def setup_optimizers(self, trainer: Any) -> None:
        """Only optimizers that treat each number by itself may see a part of a matrix.

        Raises:
            Refused: another optimizer.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if type(optimizer).__module__.partition(".")[0] != "torch":
                raise UserError(f"trainer.strategy: fsdp2 cannot divide {type(optimizer).__name__}; take 'ddp'")

    def on_validation_start(self) -> None:
        """Each process measures its share, and shares differ: from here on nothing may wait for another process."""
        assert self.lightning_module is not None
        for unit in fsdp_modules(self.lightning_module):
            unit.unshard()

    def on_validation_end(self) -> None:
        """See `on_validation_start`."""
        assert self.lightning_module is not None
        for unit in fsdp_modules(self.lightning_module):
            unit.reshard()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of whole weights, in every process."""
        return gather_full_tensors(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Of whole weights, in every process."""
        return gather_full_tensors(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its part of the states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                i: {name: local_shard(value, parameters[i]) for name, value in values.items()}
                for i, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})


StrategyRegistry.register("fsdp2", FSDP2Strategy)


def shardable_modules(parent: nn.Module, exclude: Sequence[str] = ()) -> Iterator[nn.Module]:
    """What of a method is divided: its parts that have weights and a forward pass, and what is averaged with them."""
    for name, child in parent.named_children():
        if name in exclude:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict | EMA):
            yield from shardable_modules(child)
        elif any(True for _ in child.parameters()):
            yield child


def fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """The networks that are divided."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def gather_full_tensors(value: Any) -> Any:
    """The same with its divided tensors put together, through nested containers; every process must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: gather_full_tensors(part) for key, part in value.items()}
    return [gather_full_tensors(part) for part in value] if isinstance(value, list) else value


def local_shard(value: Any, like: Tensor) -> Any:
    """This process's part of what belongs to a weight, if that is divided; a count of steps is not."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value
