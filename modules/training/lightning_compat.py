"""All that leans on Lightning's private or untyped parts; tests/modules/test_lightning_compat.py checks each assumption."""

from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler
from torch.amp import GradScaler

NULL_CONTEXT = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Lightning's idle profiler opens some fifty generator contexts a step, a quarter of a millisecond; this one none."""

    def profile(self, action_name: str) -> Any:
        """Nothing to measure."""
        return NULL_CONTEXT


class FastSetattrModule(L.LightningModule):
    """A LightningModule on which Lightning notes quickly where it is; `nn.Module` looks for parameters at each assignment."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # some thirty times a step
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def patch_training_loop(trainer: Any) -> None:
    """Take out of the training loop what a step does not need (asked in `on_train_start`).

    Lightning inspects the signature of `training_step` at every step, and with several processes broadcasts at every step
    whether one has got SIGTERM, which `callbacks/run/preemption.py` sees to.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._build_kwargs = lambda kwargs, batch, batch_idx: OrderedDict(batch=batch, batch_idx=batch_idx)
    loop._broadcast_sigterm_tensor = lambda: None


def increment_global_step(trainer: Any) -> None:
    """Let `trainer.global_step` and `max_steps` count this batch, however many optimizers stepped in it."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def grad_scaler(trainer: Any) -> GradScaler | None:
    """What scales losses under fp16; None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)


def log_every_n_steps(trainer: Any) -> int:
    """Every how many batches the loggers take figures."""
    return trainer.log_every_n_steps


def sync_logger_step(trainer: Any) -> None:
    """Set the loggers' step to the number of batches before this one (asked in `on_train_batch_start`).

    Lightning counts a batch for its loggers only after the validation that follows it. A checkpoint written between brings
    back a count that is one short, one written in a validation is counted again after the resume, and either way a resumed
    run would log its figures beside those of the uninterrupted one.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = loop.batch_progress.total.ready - 1


def is_validation_due(trainer: Any) -> bool:
    """Whether a validation follows the batch that has just ended (asked in `on_train_batch_end`).

    A checkpoint written between such a batch and its validation resumes without that validation.
    """
    interval = trainer.val_check_batch
    if trainer.should_stop:
        return True
    return bool(interval) and interval != float("inf") and (trainer.fit_loop.total_batch_idx + 1) % interval == 0
