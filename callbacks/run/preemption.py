"""Response to Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP: save after the current step, print how to resume, and stop."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from callbacks.run.checkpoints import save_checkpoint
from callbacks.run.early_signals import early_status
from callbacks.run.exit_codes import INTERRUPTED, PREEMPTED, REQUEUE_FILE
from modules.training.lightning_compat import is_validation_due


class Preemption(Callback):
    """Callback that stops a run on a signal. The handler only sets a flag; the run saves and exits after the current step.

    Args:
        path: checkpoint file to write.
        resume_hint: line to print, which explains how to resume.
    """

    def __init__(self, path: Path, resume_hint: str) -> None:
        self.path, self.resume_hint = path, resume_hint
        self.signal_status = 0
        self.newest_signal = 0
        self.between_steps = False  # during training; an exception then comes from the data
        self.handlers: dict[int, Any] = {}
        self.pending_reduce: tuple[Any, torch.Tensor] | None = None

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Handle signals before the first step, too; Lightning has installed its handlers before this hook."""
        self._install_handlers()

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop a new run before its first step if a signal was received."""
        if self.signal_status and trainer.world_size == 1:
            self._restore_handlers()
            print(f"\nStopped before the first step. {self.resume_hint}", flush=True)
            raise SystemExit(self.signal_status)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Replace Lightning's signal handlers, which save in the middle of a step."""
        self._install_handlers()
        if trainer.world_size > 1:
            self.group: Any = dist.new_group(backend="gloo")  # on the host, so that the reduction does not wait for the devices

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the previous signal handlers."""
        if self.pending_reduce is not None:
            self.pending_reduce[0].wait()
            self.pending_reduce = None
        self.between_steps = False
        self._restore_handlers()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save if the training data could not be read, such as a damaged file; restore the previous signal handlers."""
        self._restore_handlers()
        if not (self.between_steps and isinstance(exception, Exception) and trainer.world_size == 1):
            return
        save_checkpoint(trainer, self.path)
        print(f"\nThe training data could not be read. Saved. {self.resume_hint}", flush=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note that a step begins."""
        self.between_steps = False

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Note that a validation begins."""
        self.between_steps = False

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Handle signals during the test after training, too."""
        self._install_handlers()

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Exit if a signal was received; the training is already saved, and a resumed run repeats the test.

        Ranks exit independently of each other, because they have different numbers of batches. SIGTERM can mean that another
        rank has failed, so it requests no requeue of a job with several ranks.
        """
        if self.signal_status:
            if trainer.is_global_zero:
                print(f"\nStopped while evaluating. {self.resume_hint}", flush=True)
            if trainer.world_size > 1 and self.newest_signal == signal.SIGTERM:
                os.environ.pop(REQUEUE_FILE, None)
            raise SystemExit(self.signal_status)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the previous signal handlers."""
        self._restore_handlers()

    def _install_handlers(self) -> None:
        if self.handlers or threading.current_thread() is not threading.main_thread():  # other threads cannot handle signals
            return
        self.signal_status = self.signal_status or early_status()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self.handlers[number] = signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
            self.handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._on_signal)

    def _restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_status == INTERRUPTED:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a third Ctrl-C ends the run at once
        self.newest_signal = number
        self.signal_status = INTERRUPTED if number == signal.SIGINT else PREEMPTED

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop after a step; if a validation is due, stop after it."""
        if not is_validation_due(trainer) and (signal_status := self._signal_on_any_rank(trainer)):
            self._stop(trainer, signal_status)
        self.between_steps = not is_validation_due(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop after a validation during training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            if signal_status := self._signal_on_any_rank(trainer):
                self._stop(trainer, signal_status)
            self.between_steps = True

    def _signal_on_any_rank(self, trainer: Any) -> int:
        """Return the largest flag of all ranks; with several ranks, the flags are those of the previous step.

        With the flags of the current step, ranks would wait for each other.
        """
        if trainer.world_size == 1:
            return self.signal_status
        status = 0
        if self.pending_reduce is not None:
            work, flag = self.pending_reduce
            work.wait()
            status = int(flag)
        flag = torch.tensor(self.signal_status)
        self.pending_reduce = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return status

    def _stop(self, trainer: Any, signal_status: int) -> NoReturn:
        save_checkpoint(trainer, self.path)
        if trainer.is_global_zero:
            print(f"\nStopped and saved. {self.resume_hint}", flush=True)
        # Rank 0 determines the exit status of the run. Lightning kills the run if another rank exits with a nonzero status.
        raise SystemExit(signal_status if trainer.is_global_zero else 0)
