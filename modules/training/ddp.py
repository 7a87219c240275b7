"""Data-parallel strategy for manual optimization."""

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

LOOPBACK = "127.0.0.1"


class ManualDDPStrategy(DDPStrategy):
    """DDP without gradient hooks: ranks start from the same weights, and `Method` averages the gradients of each update.

    Lightning's DDP wraps the module and expects every backward pass to reach every parameter. With alternating networks it
    would reduce each gradient twice. This strategy is registered as "ddp", Lightning's default for more than one device, and as
    "ddp_bf16" with an exchange in bfloat16: half of the bytes, with 8 significant bits of each rank's gradients.

    Args:
        exchange_dtype: data type in which ranks exchange gradients; None for that of the gradients.
        kwargs: arguments of Lightning's `DDPStrategy`.
    """

    def __init__(self, *, exchange_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.exchange_dtype = exchange_dtype

    def setup_distributed(self) -> None:
        """Connect the processes. On one machine, they listen only on its loopback interface."""
        environment = self.cluster_environment
        if isinstance(environment, LightningEnvironment) and self.num_nodes == 1 and not dist.is_initialized():
            self.set_world_ranks()
            self._process_group_backend = self._get_process_group_backend()
            if Path("/sys/class/net/lo").exists():  # the interface of gloo and NCCL would be that of the host's name
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
            dist.init_process_group(
                self._process_group_backend,
                store=loopback_store(environment.main_port, self.global_rank, self.world_size, self._timeout),
                rank=self.global_rank,
                world_size=self.world_size,
                timeout=self._timeout,
                device_id=self.root_device if self.root_device.type != "cpu" else None,
            )
        super().setup_distributed()

    def configure_ddp(self) -> None:
        """Broadcast the weights and buffers of rank 0, without wrapping the module."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, src=0)


def loopback_store(port: int, rank: int, world_size: int, timeout: timedelta | None) -> dist.TCPStore:
    """Return the store of a process group, which rank 0 serves on the loopback interface; torch would serve it on all."""
    timeout = timeout or timedelta(minutes=30)
    if rank:
        return dist.TCPStore(LOOPBACK, port, world_size, is_master=False, timeout=timeout)
    server = socket.create_server((LOOPBACK, port), backlog=128)
    return dist.TCPStore(
        LOOPBACK, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=server.detach()
    )


StrategyRegistry.register("ddp", ManualDDPStrategy, override=True)
StrategyRegistry.register("ddp_bf16", ManualDDPStrategy, exchange_dtype=torch.bfloat16)
