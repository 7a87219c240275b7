"""All that leans on Lightning's private or untyped parts; tests/test_lightning_adapter.py checks each assumption."""

from contextlib import nullcontext
from typing import Any

from lightning.pytorch.profilers import PassThroughProfiler

NOTHING = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Lightning's idle profiler opens some fifty generator contexts a step, a quarter of a millisecond; this one none."""

    def profile(self, action_name: str) -> Any:
        """Nothing to measure."""
        return NOTHING


def log_every(trainer: Any) -> int:
    """Every how many batches the loggers take figures."""
    return trainer.log_every_n_steps


def align_log_axis(trainer: Any) -> None:
    """Set the loggers' step to the number of batches before this one (asked in `on_train_batch_start`).

    Lightning counts a batch for its loggers only after the validation that follows it. A checkpoint written between brings
    back a count that is one short, one written in a validation is counted again after the resume, and either way a resumed
    run would log its figures beside those of the uninterrupted one.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = loop.batch_progress.total.ready - 1


def validation_is_due(trainer: Any) -> bool:
    """Whether a validation follows the batch that has just ended (asked in `on_train_batch_end`).

    A checkpoint written between such a batch and its validation resumes without that validation.
    """
    interval = trainer.val_check_batch
    if trainer.should_stop:
        return True
    return bool(interval) and interval != float("inf") and (trainer.fit_loop.total_batch_idx + 1) % interval == 0


def write_pending_figures(trainer: Any) -> None:
    """Hand the figures of the batch that has just ended to the loggers (asked in `on_train_batch_end`).

    Lightning does so only after that hook; a run that stops there would never write them.
    """
    trainer._logger_connector.update_train_step_metrics()
