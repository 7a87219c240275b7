"""FSDP2: weights, gradients and optimizer states sharded over the ranks."""

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
    """FSDP2 with each network as one unit: its weights are full during computation and sharded otherwise.

    This strategy is registered as "fsdp2". Checkpoints contain full weights and states, as with "ddp", so a run can resume with
    either strategy. Lightning's own FSDP2 strategy does not shard unless the mesh sizes are given. Lightning's "fsdp" strategy
    cannot train alternating networks.
    """

    def configure_ddp(self) -> None:
        """Broadcast the weights of rank 0, then shard them.

        Networks under a gradient penalty stay unsharded, as with "ddp": torch frees a sharded weight after the first of the
        two backward passes.
        """
        super().configure_ddp()
        method: Any = self.lightning_module
        mesh = init_device_mesh(self.root_device.type, (dist.get_world_size(),))
        for network in shardable_modules(method, method.double_backward_networks):
            network.to(memory_format=torch.contiguous_format)  # fully_shard requires contiguous weights
            fully_shard(network, mesh=mesh, reshard_after_forward=False)

    def setup_optimizers(self, trainer: Any) -> None:
        """Set up the optimizers, and accept only those of torch; others may need full matrices, but each rank has a shard.

        Raises:
            UserError: an optimizer is not from torch.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if type(optimizer).__module__.partition(".")[0] != "torch":
                raise UserError(f"trainer.strategy: fsdp2 cannot shard {type(optimizer).__name__}. Use 'ddp'")

    def on_validation_start(self) -> None:
        """Gather the full weights: ranks evaluate different numbers of items, so validation must not use collectives."""
        assert self.lightning_module is not None
        for unit in fsdp_modules(self.lightning_module):
            unit.unshard()

    def on_validation_end(self) -> None:
        """Shard the weights again."""
        assert self.lightning_module is not None
        for unit in fsdp_modules(self.lightning_module):
            unit.reshard()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state dict with full tensors, on every rank."""
        return gather_full_tensors(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the optimizer state with full tensors, on every rank."""
        return gather_full_tensors(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shards of the optimizer states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            local_state = {
                i: {name: local_shard(value, parameters[i]) for name, value in values.items()}
                for i, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": local_state})


StrategyRegistry.register("fsdp2", FSDP2Strategy)


def shardable_modules(parent: nn.Module, exclude: Sequence[str] = ()) -> Iterator[nn.Module]:
    """Yield the networks to shard: the children that have parameters, and those inside containers and EMA modules."""
    for name, child in parent.named_children():
        if name in exclude:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict | EMA):
            yield from shardable_modules(child)
        elif any(True for _ in child.parameters()):
            yield child


def fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """List the sharded networks of a method."""
    return [item for item in module.modules() if isinstance(item, FSDPModule)]


def gather_full_tensors(value: Any) -> Any:
    """Replace sharded tensors in nested containers with full ones; every rank must call this function."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: gather_full_tensors(item) for key, item in value.items()}
    return [gather_full_tensors(item) for item in value] if isinstance(value, list) else value


def local_shard(value: Any, like: Tensor) -> Any:
    """Shard an optimizer state in the same way as its parameter; step counts do not change."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value
