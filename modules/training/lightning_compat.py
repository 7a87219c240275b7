"""Code that relies on Lightning's private or untyped API; tests/modules/test_lightning_compat.py checks each assumption.

`NoProfiler`, `FastSetattrModule` and `patch_training_loop` only save time. Without them, a step of autoencoder/demo takes 0.9
to 1.2 ms longer than a step of a bare loop. They reduce this difference by 0.2 to 0.3 ms (`darkroom bench`, two rounds, one
CPU thread).
"""

from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler
from torch.amp import GradScaler

NULL_CONTEXT = nullcontext()
NEVER = 2**62  # batches between two validations


class NoProfiler(PassThroughProfiler):
    """Profiler without overhead; Lightning's default profiler opens about fifty generator contexts per step (0.25 ms)."""

    def profile(self, action_name: str) -> Any:
        """Return a null context."""
        return NULL_CONTEXT


class FastSetattrModule(L.LightningModule):
    """LightningModule with fast assignment of the current hook's name; `nn.Module` would search its parameters first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # about thirty assignments per step
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def patch_training_loop(trainer: Any) -> None:
    """Remove two unneeded operations from the training loop; call it in `on_train_start`.

    At every step, Lightning inspects the signature of `training_step`. With several ranks, it also broadcasts at every step
    whether a rank has received SIGTERM. `callbacks/run/preemption.py` handles this signal instead.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._build_kwargs = lambda kwargs, batch, batch_idx: OrderedDict(batch=batch, batch_idx=batch_idx)
    loop._broadcast_sigterm_tensor = lambda: None


def increment_global_step(trainer: Any) -> None:
    """Count this batch once in `trainer.global_step` and `max_steps`, for any number of optimizer steps."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def grad_scaler(trainer: Any) -> GradScaler | None:
    """Return the loss scaler of fp16; None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)


def datamodule(trainer: Any) -> Any:
    """Return the datamodule of the trainer; Lightning does not declare this attribute."""
    return trainer.datamodule


def log_every_n_steps(trainer: Any) -> int:
    """Return the logging interval in batches."""
    return trainer.log_every_n_steps


def sync_logger_step(trainer: Any) -> None:
    """Set the loggers' step to the number of batches before this one; call it in `on_train_batch_start`.

    Lightning counts a batch for its loggers only after the validation that follows it. A checkpoint written between the two
    restores a count that is one too low. A batch with a checkpoint in its validation is counted again after resuming. In both
    cases, the logged steps of a resumed run would differ from those of an uninterrupted run.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = loop.batch_progress.total.ready - 1


def is_validation_due(trainer: Any) -> bool:
    """Return whether a validation follows the batch that has just ended; call it in `on_train_batch_end`.

    A checkpoint must not be saved between the batch and its validation, because a resumed run would skip that validation.
    """
    interval = trainer.val_check_batch
    if trainer.should_stop:
        return True
    return bool(interval) and interval != float("inf") and (trainer.fit_loop.total_batch_idx + 1) % interval == 0


def schedule_validation(trainer: Any, is_due: bool) -> None:
    """Set whether a validation follows the newest batch; call it in `on_train_batch_start`."""
    trainer.val_check_batch = trainer.fit_loop.total_batch_idx + 1 if is_due else NEVER
