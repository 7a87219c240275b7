"""Ctrl-C and SIGTERM: save at the next step, say how to go on, stop."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from callbacks.run.checkpoints import save
from callbacks.run.exit_codes import INTERRUPTED, PREEMPTED
from modules.training.lightning_compat import validation_is_due


class Preemption(Callback):
    """The handler only raises a flag; the run saves where a step has ended and leaves.

    Args:
        path: the checkpoint to write.
        advice: what to tell the user, one line.
    """

    def __init__(self, path: Path, advice: str) -> None:
        self.path, self.advice = path, advice
        self.status = 0
        self.handlers: dict[int, Any] = {}
        self.asked: tuple[Any, torch.Tensor] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the signals over from Lightning, whose own handlers save in the middle of a step."""
        self._take_over()
        if trainer.world_size > 1:
            self.group: Any = dist.new_group(backend="gloo")  # on the host: asking must not wait for the devices

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the signals back."""
        if self.asked is not None:
            self.asked[0].wait()
            self.asked = None
        self._give_back()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """See `on_train_end`."""
        self._give_back()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """What is measured after training may be interrupted too."""
        self._take_over()

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leave; training is done and saved, the measurement is made anew. Processes are not asked: their shares differ."""
        if self.status:
            if trainer.is_global_zero:
                print(f"\nStopped while measuring. {self.advice}", flush=True)
            raise SystemExit(self.status)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """See `on_train_end`."""
        self._give_back()

    def _take_over(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self.handlers[number] = signal.signal(number, self._raise_flag)

    def _give_back(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.status == INTERRUPTED:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a third Ctrl-C does not wait for the step
        self.status = INTERRUPTED if number == signal.SIGINT else PREEMPTED

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop here, unless a validation belongs to this step: then after it."""
        if not validation_is_due(trainer) and (status := self._agreed(trainer)):
            self._stop(trainer, status)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop after a validation during training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and (status := self._agreed(trainer)):
            self._stop(trainer, status)

    def _agreed(self, trainer: Any) -> int:
        """The flag, once it is up in any process; with several, as it was a step ago, so that none waits for another."""
        if trainer.world_size == 1:
            return self.status
        answer = 0
        if self.asked is not None:
            work, flag = self.asked
            work.wait()
            answer = int(flag)
        flag = torch.tensor(self.status)
        self.asked = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return answer

    def _stop(self, trainer: Any, status: int) -> NoReturn:
        save(trainer, self.path)
        if trainer.is_global_zero:
            print(f"\nStopped; nothing is lost. {self.advice}", flush=True)
        # The first process's status is the run's; Lightning kills it when another one's is not 0.
        raise SystemExit(status if trainer.is_global_zero else 0)
