"""Callbacks for tests."""

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback


class SignalAt(Callback):
    """Sends the signal named in DARKROOM_TEST_SIGNAL ("SIGKILL@32@0": after 32 images, on rank 0; "SIGTERM@test")."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        name, images, rank = f"{os.environ.get('DARKROOM_TEST_SIGNAL', 'SIGKILL@-1')}@0".split("@")[:3]
        if str(pl_module.images_seen) == images and trainer.global_rank == int(rank):
            os.kill(os.getpid(), getattr(signal, name))

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        name, _, when = os.environ.get("DARKROOM_TEST_SIGNAL", "").partition("@")
        if when == "test" and batch_idx == 1:
            os.kill(os.getpid(), getattr(signal, name))


class RanksAgree(Callback):
    """All processes have the same weights after every step, and the same buffers when they measure."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._compare(trainer, dict(pl_module.named_parameters()))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._compare(trainer, pl_module.state_dict())

    def _compare(self, trainer: Any, tensors: dict[str, torch.Tensor]) -> None:
        if trainer.world_size == 1:
            return
        for name, tensor in tensors.items():
            of_first = tensor.detach().clone()
            dist.broadcast(of_first, src=0)
            assert torch.equal(of_first, tensor), f"{name} differs on rank {trainer.global_rank}"
