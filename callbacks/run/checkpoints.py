"""Checkpoints: the newest state to go on from, and the best weights to measure."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from datamodules.errors import UserError
from modules.training.gradients import broadcast_buffers


class Checkpoints(Callback):
    """Writes `last.ckpt` after every validation, and `best.ckpt` when the monitored figure has risen.

    Both are written beside their place and moved there, so a run that is killed while it writes keeps the older file.

    Args:
        folder: where they go.
        monitor: the logged figure that chooses the best, higher is better; without one the newest is the best.
    """

    def __init__(self, folder: Path, monitor: str | None = None) -> None:
        self.last, self.best, self.monitor = folder / "last.ckpt", folder / "best.ckpt", monitor
        self.best_value = float("-inf")
        self.best_images = 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the state, and the weights if they are the best so far."""
        if trainer.state.fn != "fit":
            return
        if self.monitor is not None and self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if "/" in name))
            raise UserError(f"monitor: no figure '{self.monitor}' is logged; these are: {known}")
        if trainer.sanity_checking:
            return
        improved = True
        if self.monitor is not None:
            value = float(trainer.callback_metrics[self.monitor])
            improved = value > self.best_value
            self.best_value = value if improved else self.best_value
        if improved:
            self.best_images = pl_module.images_seen
            save_atomic(trainer, self.best)
        save_atomic(trainer, self.last)

    def state_dict(self) -> dict[str, Any]:
        """The best figure so far."""
        return {"best_value": self.best_value, "best_images": self.best_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.best_value, self.best_images = state_dict["best_value"], state_dict["best_images"]


def save_atomic(trainer: Any, path: Path) -> None:
    """Write a checkpoint so that `path` is at every moment either the old one or the new one, whole.

    Raises:
        Refused: a weight has become infinite or not a number; the older checkpoint stays.
    """
    module = trainer.lightning_module
    if trainer.world_size > 1:
        broadcast_buffers(module)
    for name, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"'{name}' has values that are not finite after {module.images_seen} images; {path} stays as it was. "
                f"Lower model.learning_rate (now {module.learning_rate})"
            )
    tmp_path = path.with_suffix(".part")
    trainer.save_checkpoint(tmp_path)
    if trainer.is_global_zero:
        tmp_path.replace(path)
    trainer.strategy.barrier("the checkpoint is in its place")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint (.ckpt) or of committed weights (.safetensors), by name."""
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError("not a checkpoint, which has a state_dict")
    return content["state_dict"]


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names and values: the same for a checkpoint and for the file committed from it."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_weights(module: L.LightningModule, path: Path) -> None:
    """Fill a module with the weights of a checkpoint (.ckpt) or of committed weights (.safetensors).

    Raises:
        Refused: the file does not hold this network's weights; the message names the file and the first difference.
    """
    try:
        weights = read_weights(path)
    except (OSError, EOFError, ValueError, KeyError, TypeError, SafetensorError, UnpicklingError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read as weights: {reason}") from None
    wanted = inference_state_dict(module, module.state_dict())
    weights = inference_state_dict(module, weights)
    for name in sorted(wanted.keys() | weights.keys()):
        have, want = (tuple(side[name].shape) if name in side else "nothing" for side in (weights, wanted))
        if have != want:
            raise UserError(f"{path} does not fit this model: '{name}' is {have} there, the model needs {want}")
    module.load_state_dict(weights, strict=False)


def inference_state_dict(method: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a method's weights is used after training: all but the parts that it calls `training_only_modules`.

    Args:
        method: a method, or its class.
        weights: its state.
    """
    parts = tuple(f"{part}." for part in getattr(method, "training_only_modules", ()))
    return {name: tensor for name, tensor in weights.items() if not (parts and name.startswith(parts))}
