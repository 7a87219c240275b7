"""Callbacks that send signals to runs or check them."""

import gc
import json
import os
import signal
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from modules.training.fsdp import gather_full_tensors


class SignalAt(Callback):
    """Sends the signals named in DARKROOM_TEST_SIGNAL to this process.

    "SIGKILL@32@0" is sent after 32 images on rank 0. "SIGTERM@24@0 SIGTERM@28@1" signals both ranks. An event can replace the
    number of images: "validation" (the first one after a training step), "saving" or "test".
    """

    def __init__(self) -> None:
        self.due = [f"{signal_at}@0".split("@")[:3] for signal_at in os.environ.get("DARKROOM_TEST_SIGNAL", "").split()]
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            self.due = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._send(trainer, str(pl_module.images_seen))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.images_seen:
            self._send(trainer, "validation")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self._send(trainer, "saving")

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 1:
            self._send(trainer, "test")

    def _send(self, trainer: Any, event: str) -> None:
        for due in list(self.due):
            name, due_event, rank = due
            if due_event == event and int(rank) == trainer.global_rank:
                self.due.remove(due)
                os.kill(os.getpid(), getattr(signal, name))


class FillsDisk(Callback):
    """Fills the disk of the run after 24 images."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.images_seen == 24:
            with Path(os.environ["DARKROOM_RUNS"], "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
                while True:
                    ballast.write(bytes(2**16))


class RanksAgree(Callback):
    """Asserts that all ranks have equal weights after every step, and equal buffers before every validation."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._compare(trainer, dict(pl_module.named_parameters()))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._compare(trainer, {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())})

    def _compare(self, trainer: Any, tensors: dict[str, torch.Tensor]) -> None:
        if trainer.world_size == 1:
            return
        for name, tensor in tensors.items():
            tensor = gather_full_tensors(tensor.detach())
            first_rank_tensor = tensor.clone()
            dist.broadcast(first_rank_tensor, src=0)
            assert torch.equal(first_rank_tensor, tensor), f"{name} differs on rank {trainer.global_rank}"


class HoldsHalf(Callback):
    """Asserts that each of two ranks holds half of the weights and optimizer states when training ends."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        tensors = [*pl_module.parameters()]
        for optimizer in trainer.optimizers:
            tensors += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        local_size = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors)
        fraction = local_size / sum(tensor.numel() for tensor in tensors)
        assert 0.4 < fraction < 0.6, f"{fraction:.2f} of the weights and states are on this rank"


class GatheredBytes(TorchDispatchMode):
    """Records the most bytes of full weights, with the outputs of all-gathers, after any operator; counts reduce-scatters."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method, self.gathered, self.peak, self.reductions = method, [], 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "_allgather_base_" in str(func):
            self.gathered.append(weakref.ref(args[0]))
        self.reductions += "_reduce_scatter_base_" in str(func)
        tensors = [weight for weight in self.method.parameters() if not isinstance(weight, DTensor)]
        tensors += [tensor for reference in self.gathered if (tensor := reference()) is not None]
        self.peak = max(self.peak, sum({id(t): t.untyped_storage().nbytes() for t in tensors}.values()))
        return result


class ReportsMemory(Callback):
    """Prints the bytes of weights, gradients and states that rank 0 holds after a step, and of full weights in a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.mode = GatheredBytes(pl_module)
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mode.__exit__(None, None, None)
        weights = list(pl_module.parameters())
        states = [value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()]
        tensors = [*weights, *(weight.grad for weight in weights if weight.grad is not None), *states]
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())
        full = sum(tensor.nbytes for tensor in tensors)
        if trainer.is_global_zero:
            counts = {"held": held, "full": full, "peak": self.mode.peak, "reductions": self.mode.reductions}
            print("memory", json.dumps(counts), flush=True)


class ListensOnLoopback(Callback):
    """Asserts that the processes of a run on one machine listen only on the loopback interface (Linux)."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size == 1 or any(name.startswith(("TORCHELASTIC", "SLURM")) for name in os.environ):
            return
        inodes = set()
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
        addresses = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:  # listening, and of this process
                    addresses.add(fields[1].partition(":")[0])
        loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
        assert addresses, "no process listens"
        assert addresses <= loopback, addresses


class WaitsForDevice(TorchDispatchMode):
    """Dispatch mode in which operations raise an error that would wait for a GPU, because the host reads their result.

    `allowed` contains scalars that are on the CPU in any case: the step counts of optimizers that are not fused.
    """

    def __init__(self, allowed: set[int]) -> None:
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [index for index in args[1] if index is not None] if name in ("index", "index_put", "index_put_") else []
        by_mask = any(index.dtype in (torch.bool, torch.uint8) for index in masks)
        if name in ("nonzero", "masked_select", "_unique2", "unique_dim") or by_mask:
            raise AssertionError(f"{func} waits for the device")
        if name == "_local_scalar_dense" and args[0].data_ptr() not in self.allowed:
            raise AssertionError("a value is read from the device (.item(), a comparison, or float())")
        return func(*args, **(kwargs or {}))


class NoSynchronization(Callback):
    """Asserts that the steps of a process after the second one do not wait for the device, apart from those that log.

    On the CPU, operations raise that would wait for a GPU. On a GPU, the copies of the data between steps are included, if no
    step logs.
    """

    mode: WaitsForDevice | None = None
    n_steps = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        logs = (batch_idx + 1) % trainer.log_every_n_steps == 0 if trainer.log_every_n_steps else False
        is_last = pl_module.images_seen + pl_module.stage_plan.batch_size(pl_module.images_seen) >= pl_module.total_images
        self.n_steps += 1
        resets = pl_module.images_seen in pl_module.stage_plan.starts  # optimizers, whose new step counts are on the CPU
        if pl_module.device.type != "cpu" or self.n_steps < 3 or logs or is_last or resets:
            return
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        steps = (state.get("step") for state in states)
        self.mode = WaitsForDevice({step.data_ptr() for step in steps if isinstance(step, torch.Tensor)})
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode = None
        if pl_module.device.type == "cuda" and trainer.log_every_n_steps > 10:
            torch.cuda.set_sync_debug_mode("error" if 4 <= self.n_steps < 10 else "default")


class ConstantMemory(Callback):
    """Asserts that the allocated memory of the GPU is the same after 40 and after 100 steps."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type == "cuda" and batch_idx in (39, 99):  # both log their losses
            torch.cuda.synchronize()
            gc.collect()
            allocated = torch.cuda.memory_allocated()
            if batch_idx == 39:
                self.before = allocated
            assert allocated <= self.before, f"{allocated - self.before} bytes more than 60 steps before"


class SleepsAfterSteps(Callback):
    """Waits for DARKROOM_TEST_SLEEP seconds after each step, so that a small training takes a while."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(float(os.environ["DARKROOM_TEST_SLEEP"]))
