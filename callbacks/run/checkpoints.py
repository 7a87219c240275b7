"""Checkpoints: the latest state to resume from, and the best weights to evaluate."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from datamodules.errors import UserError
from modules.training.gradients import broadcast_buffers


class Checkpoints(Callback):
    """Callback that writes `last.ckpt` after every validation, and `best.ckpt` when the monitored metric has improved.

    Both are first written to a temporary file, which then replaces the older checkpoint. A run that is killed during writing
    keeps the older checkpoint.

    Args:
        folder: folder of both checkpoints.
        monitor: logged metric that selects the best weights, higher is better; None to use the latest weights.
    """

    def __init__(self, folder: Path, monitor: str | None = None) -> None:
        self.last, self.best, self.monitor = folder / "last.ckpt", folder / "best.ckpt", monitor
        self.best_value = float("-inf")
        self.best_images = 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the state, and the weights if they are the best so far.

        Raises:
            UserError: the monitored metric is not logged, or a weight is not finite.
        """
        if trainer.state.fn != "fit":
            return
        if self.monitor is not None and self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if "/" in name))
            raise UserError(f"monitor: no metric '{self.monitor}' is logged. Use one of: {known}")
        if trainer.sanity_checking:
            return
        improved = True
        if self.monitor is not None:
            value = float(trainer.callback_metrics[self.monitor])
            improved = value > self.best_value
            self.best_value = value if improved else self.best_value
        if improved:
            self.best_images = pl_module.images_seen
            save_checkpoint(trainer, self.best)
        save_checkpoint(trainer, self.last)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value of the metric so far, and the images seen at that validation."""
        return {"best_value": self.best_value, "best_images": self.best_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, see `state_dict`."""
        self.best_value, self.best_images = state_dict["best_value"], state_dict["best_images"]


def save_checkpoint(trainer: Any, path: Path) -> None:
    """Write a checkpoint to a temporary file and move it to `path`, so that `path` is always complete.

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
    trainer.strategy.barrier("the checkpoint is in its place")
