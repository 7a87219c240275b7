"""Checkpoints: the latest state to resume from, and the best weights to evaluate."""

import errno
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from callbacks.run.exit_codes import note_progress
from datamodules.errors import UserError, is_dead_worker
from modules.networks.weights import join_shards
from modules.training.gradients import broadcast_buffers


class Checkpoints(Callback):
    """Callback that writes `last.ckpt` after every validation, and `best.ckpt` when the monitored metric has improved.

    Both are first written to a temporary file, which then replaces the older checkpoint. A run that is killed during writing
    keeps the older checkpoint. With "fsdp2", a folder next to each has the shards, see `join_shards`. If training ends without
    a validation, for example because of `max_steps`, both are written at its end. While the metric is not a number, such as
    the IoU of an absent class, `best.ckpt` has the latest weights.

    Args:
        folder: folder of both checkpoints.
        monitor: logged metric that selects the best weights; None to use the latest weights.
        mode: "max" if higher values of the metric are better, "min" if lower ones are.
    """

    def __init__(self, folder: Path, monitor: str | None = None, mode: Literal["max", "min"] = "max") -> None:
        self.last, self.best, self.monitor, self.monitor_mode = folder / "last.ckpt", folder / "best.ckpt", monitor, mode
        self.best_value = float("-inf") if mode == "max" else float("inf")
        self.best_images = 0
        self.saved_images = 0  # images seen at the newest checkpoint
        self.resumed_at = 0  # images seen at the checkpoint from which the run resumes

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Assert that all processes resume the same run at the same checkpoint.

        Lightning restores the state of the loops after this hook: a process without the checkpoint would then validate first,
        and the others would wait for it.

        Raises:
            UserError: a process has another folder, or sees another checkpoint there.
        """
        if trainer.world_size == 1:
            return
        plans: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(plans, f"{self.last} after {self.resumed_at:,} images")
        for rank, plan in enumerate(plans):
            if plan != plans[0]:
                raise UserError(
                    f"process 0 continues {plans[0]}, but process {rank} {plan}. "
                    "Set DARKROOM_RUNS to one folder that all machines share"
                )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note that the state of a resumed run is saved."""
        self.saved_images = pl_module.images_seen

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the state, and the weights if they are the best so far.

        Raises:
            UserError: the monitored metric is not logged, or a weight is not finite.
        """
        if trainer.state.fn != "fit":
            return
        if self.monitor is not None and self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if "/" in name))
            raise UserError(
                f"monitor: no metric '{self.monitor}' is logged. "
                + (f"Use one of: {known}" if known else "No metric is logged at validations; use null for the latest weights")
            )
        if trainer.sanity_checking:
            return
        if self._has_improved(trainer, pl_module):
            self.best_images = pl_module.images_seen
            save_checkpoint(trainer, self.best)
        save_checkpoint(trainer, self.last)
        self.saved_images = pl_module.images_seen

    def _has_improved(self, trainer: Any, pl_module: Any) -> bool:
        if self.monitor is None:
            return True
        value = float(trainer.callback_metrics[self.monitor])
        if math.isnan(value):
            if trainer.is_global_zero:
                print(f"monitor   {self.monitor} is not a number after {pl_module.images_seen:,} images", flush=True)
            return math.isinf(self.best_value)  # there was no number before
        improved = value > self.best_value if self.monitor_mode == "max" else value < self.best_value
        self.best_value = value if improved else self.best_value
        return improved

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the state if training has ended after the last validation, and the weights if there was no validation."""
        if self.saved_images == pl_module.images_seen:
            return
        if not self.best_images:
            self.best_images = pl_module.images_seen
            save_checkpoint(trainer, self.best)
        save_checkpoint(trainer, self.last)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value of the metric so far, and the images seen at that validation."""
        return {"best_value": self.best_value, "best_images": self.best_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, see `state_dict`."""
        self.best_value, self.best_images = state_dict["best_value"], state_dict["best_images"]


class LocalCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint directly to its path; Lightning first writes it to the folder of temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: the file cannot be written completely; it names the file.
        """
        try:
            torch.save(checkpoint, path)
        except RuntimeError as error:  # torch does not say which error of the system it was
            if is_dead_worker(error):
                raise
            Path(path).unlink(missing_ok=True)
            raise OSError(errno.ENOSPC, f"not written ({' '.join(str(error).split())[:100]})", str(path)) from None

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, and assemble its shards if it has any.

        Raises:
            UserError: a file of shards is missing or damaged.
        """
        return join_shards(Path(path), super().load_checkpoint(path, *args, **kwargs))


def save_checkpoint(trainer: Any, path: Path) -> None:
    """Write a checkpoint to a temporary file and move it to `path`, so that `path` is always complete.

    The job of the run is told if a later start would resume after more images than this one.

    Raises:
        UserError: a weight is infinite or NaN; the older checkpoint remains.
    """
    module = trainer.lightning_module
    if trainer.world_size > 1:
        broadcast_buffers(module)
    for name, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"'{name}' has values that are not finite after {module.images_seen} images; {path} is unchanged. "
                f"Lower model.learning_rate (now {module.learning_rate})"
            )
    tmp_path = path.with_suffix(".part")
    trainer.save_checkpoint(tmp_path)
    if trainer.is_global_zero:
        tmp_path.replace(path)
        checkpoints = next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)
        if checkpoints and path == checkpoints.last and module.images_seen > checkpoints.resumed_at:
            note_progress()
        for folder in path.parent.glob(f"{path.stem}-*.shards"):  # of older checkpoints
            if folder != getattr(trainer.strategy, "newest_shards", None):
                shutil.rmtree(folder, ignore_errors=True)
    trainer.strategy.barrier("the checkpoint is in its place")
