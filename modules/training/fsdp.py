"""FSDP2: weights, gradients and optimizer states sharded over the ranks, block by block."""

import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from datamodules.errors import UserError
from modules.networks.weights import SHARDED_PARTS
from modules.training.ddp import ManualDDPStrategy
from modules.training.ema import EMA

SMALL_PART = 64  # a part that is smaller than the largest layer by this factor is gathered with the rest of its network


class FSDP2Strategy(ManualDDPStrategy):
    """FSDP2 by block: the weights of a block are full while it computes, and sharded otherwise.

    This strategy is registered as "fsdp2". Each network is split into blocks that are at most as large as the largest layer,
    see `blocks`. During a forward or backward pass, a process holds the full weights of the current block, of the next one,
    which is gathered during the computation, and of the small rest of the network. With `accumulate_grad_batches`, gradients
    are reduced after the last micro-batch only; until then, a process holds the full gradients.

    Networks under a gradient penalty have full weights from their first forward pass to the end of the phase, because the two
    backward passes need them in another order. Their gradients and optimizer states are sharded. Validations hold the full
    weights of all networks, because the ranks evaluate different numbers of items. With "bf16-mixed" and "16-mixed", autograd
    keeps the 16-bit copies of all weights from the forward to the backward pass.

    Each process saves its shards, see `join_shards`. Reading a checkpoint assembles full tensors in main memory, so that a run
    can resume with another number of processes, or with "ddp". Lightning's own FSDP2 strategy does not shard unless the mesh
    sizes are given. Lightning's "fsdp" strategy cannot train alternating networks.
    """

    def model_to_device(self) -> None:
        """Leave the networks on the CPU before training: `configure_ddp` moves and shards one block at a time."""
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            super().model_to_device()

    def configure_ddp(self) -> None:
        """Shard the weights of rank 0, and broadcast its other weights and buffers."""
        method: Any = self.lightning_module
        mesh = init_device_mesh(self.root_device.type, (dist.get_world_size(),))
        largest_layer = max(count_weights(module.parameters(recurse=False)) for module in method.modules())
        networks: list[nn.Module] = []
        self.kept_units: set[nn.Module] = set()  # those that are full from the first forward pass to the end of the phase
        for name, child in method.named_children():
            is_kept = name in method.double_backward_networks
            for network in called_modules(child):
                network.to(memory_format=torch.contiguous_format)  # fully_shard requires contiguous weights
                units = [*blocks(network, largest_layer), network]
                for unit in units:
                    for weight in unit.parameters():
                        if not isinstance(weight, DTensor):
                            value = weight.detach().to(self.root_device)
                            dist.broadcast(value, src=0)
                            weight.detach().copy_(value)
                    sharded = fully_shard(unit, mesh=mesh, reshard_after_forward=not is_kept)  # on the device of the mesh
                    sharded.set_reshard_after_backward(not is_kept, recurse=False)
                networks.append(network)
                self.kept_units.update(units if is_kept else [])
        method.to(self.root_device)
        for tensor in method.state_dict().values():
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor, src=0)
        if len(method.phases()) == 1:
            share_order([network for network in networks if any(weight.requires_grad for weight in network.parameters())])

    def setup_optimizers(self, trainer: Any) -> None:
        """Set up the optimizers, and accept only those of torch; others may need full matrices, but each rank has a shard.

        Raises:
            UserError: an optimizer is not from torch, or also has weights that are not in a network.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if type(optimizer).__module__.partition(".")[0] != "torch":
                raise UserError(f"trainer.strategy: fsdp2 cannot shard {type(optimizer).__name__}. Use 'ddp'")
            if len({isinstance(weight, DTensor) for group in optimizer.param_groups for weight in group["params"]}) > 1:
                name = type(self.lightning_module).__name__
                raise UserError(f"trainer.strategy: fsdp2 shards networks, but {name} also has weights of its own. Use 'ddp'")

    def on_validation_start(self) -> None:
        """Gather the full weights: ranks evaluate different numbers of items, so validation must not use collectives."""
        assert self.lightning_module is not None
        for unit in fsdp_modules(self.lightning_module):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()

    def on_validation_end(self) -> None:
        """Shard the weights again."""
        assert self.lightning_module is not None
        for unit in fsdp_modules(self.lightning_module):
            unit.set_reshard_after_forward(unit not in self.kept_units, recurse=False)
            unit.reshard()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the shards of each rank to a new folder next to the file, and all else to the file, see `join_shards`.

        Raises:
            OSError: a file cannot be written completely; it names the file.
        """
        path = Path(filepath)
        folder: Path = self.broadcast(path.with_name(f"{path.stem}-{secrets.token_hex(4)}.shards"))
        folder.mkdir(exist_ok=True)
        shards: dict[str, list[Tensor]] = {part: [] for part in SHARDED_PARTS}
        replaced = {part: take_shards(checkpoint[part], shards[part]) for part in SHARDED_PARTS}
        try:
            self.checkpoint_io.save_checkpoint(shards, folder / f"{self.global_rank}.pt")
            self.barrier("all shards are written")
            super().save_checkpoint({**checkpoint, **replaced, "shards": folder.name}, filepath, storage_options)
        except OSError:  # a full disk
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.newest_shards = folder

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


def called_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a network if it has weights; for a container that is never called, such as a ModuleList or an EMA, its networks."""
    if isinstance(module, EMA) or not is_called(module):
        for child in module.children():
            yield from called_modules(child)
    elif count_weights(module.parameters()):
        yield module


def blocks(network: nn.Module, size: int) -> Iterator[nn.Module]:
    """Yield the blocks of a network: its largest parts that have at most `size` weights and are called as a whole.

    A larger part is split into its children. What remains, and parts with less than `size` / 64 weights, are not in a block.
    A network of at most `size` weights, or with weights that several layers share, has no blocks.

    Args:
        network: a network, or a part of one.
        size: number of weights of the largest layer. More memory would be saved by no other division, because a layer is
            gathered as a whole.
    """
    weights = [weight for _, weight in network.named_parameters(remove_duplicate=False)]
    if len(weights) > len(set(weights)) or (is_called(network) and count_weights(weights) <= size):
        return
    for child in network.children():
        if is_called(child) and size < SMALL_PART * count_weights(child.parameters()) <= SMALL_PART * size:
            yield child
        else:
            yield from blocks(child, size)


def is_called(module: nn.Module) -> bool:
    """Return whether a module has a forward function, which a ModuleList does not have."""
    return type(module).forward is not nn.Module.forward


def count_weights(weights: Iterable[Tensor]) -> int:
    """Count the elements of weights."""
    return sum(weight.numel() for weight in weights)


def share_order(networks: list[nn.Module]) -> None:
    """Let networks that one backward pass goes through gather their blocks ahead of each other.

    FSDP2 gathers blocks in the reverse order of the forward pass, but by itself only within a network. Torch 2.9 cannot.
    Averages of weights must not be among the networks: after a validation, they would be gathered and then keep these values.
    """
    if hasattr(fsdp, "share_comm_ctx"):
        for network in networks:
            if isinstance(network, FSDPModule):
                network._get_fsdp_state()._lazy_init()  # otherwise, each first forward pass would clear the shared order
        fsdp.share_comm_ctx([unit for network in networks for unit in fsdp_modules(network)])


def fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """List the sharded networks of a method, and their blocks."""
    return [item for item in module.modules() if isinstance(item, FSDPModule)]


def reduce_gradients(units: list[FSDPModule], enabled: bool) -> None:
    """Set whether the next backward pass averages the gradients over the ranks, or only adds them up."""
    for unit in units:
        unit.set_requires_gradient_sync(enabled, recurse=False)


def reshard(units: list[FSDPModule]) -> None:
    """Shard the weights that are still full."""
    for unit in units:
        unit.reshard()


def check_reduced(units: list[FSDPModule]) -> None:
    """Check that no gradient of full weights is left after a backward pass.

    FSDP2 averages the gradients of a block when the backward pass reaches its outputs. The gradient penalty of a linear
    network depends on its weights, but not on its outputs.

    Raises:
        UserError: a gradient is left.
    """
    for unit in units:
        for name, weight in unit.named_parameters() if isinstance(unit, nn.Module) else ():
            if weight.grad is not None and not isinstance(weight, DTensor):
                raise UserError(
                    f"trainer.strategy: fsdp2 cannot average the gradient of '{name}' in {type(unit).__name__}: it does not "
                    "depend on the outputs. Use 'ddp'"
                )


def gather_full_tensors(value: Any) -> Any:
    """Replace sharded tensors in nested containers with full ones; every rank must call this function."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: gather_full_tensors(item) for key, item in value.items()}
    return [gather_full_tensors(item) for item in value] if isinstance(value, list) else value


def take_shards(value: Any, shards: list[Tensor]) -> Any:
    """Replace sharded tensors in nested containers with "meta" tensors of their full shape, and append this rank's shards."""
    if isinstance(value, DTensor):
        if not value.placements[0].is_shard(0):
            return value.full_tensor()
        shards.append(value.to_local())
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, dict):
        return {key: take_shards(item, shards) for key, item in value.items()}
    return [take_shards(item, shards) for item in value] if isinstance(value, list) else value


def local_shard(value: Any, like: Tensor) -> Any:
    """Shard an optimizer state in the same way as its parameter; step counts do not change."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        shard = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        return shard.clone()  # otherwise, it would be a view of the full tensor
    return value
