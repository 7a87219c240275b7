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

from datamodules.errors import Refused
from modules.training.gradients import share_buffers


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
            raise Refused(f"monitor: no figure '{self.monitor}' is logged; these are: {known}")
        if trainer.sanity_checking:
            return
        risen = True
        if self.monitor is not None:
            value = float(trainer.callback_metrics[self.monitor])
            risen = value > self.best_value
            self.best_value = value if risen else self.best_value
        if risen:
            self.best_images = pl_module.images_seen
            save(trainer, self.best)
        save(trainer, self.last)

    def state_dict(self) -> dict[str, Any]:
        """The best figure so far."""
        return {"best_value": self.best_value, "best_images": self.best_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.best_value, self.best_images = state_dict["best_value"], state_dict["best_images"]


def save(trainer: Any, path: Path) -> None:
    """Write a checkpoint so that `path` is at every moment either the old one or the new one, whole.

    Raises:
        Refused: a weight has become infinite or not a number; the older checkpoint stays.
    """
    module = trainer.lightning_module
    if trainer.world_size > 1:
        share_buffers(module)
    for name, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise Refused(
                f"'{name}' has values that are not finite after {module.images_seen} images; {path} stays as it was. "
                f"Lower model.learning_rate (now {module.learning_rate})"
            )
    beside = path.with_suffix(".part")
    trainer.save_checkpoint(beside)
    if trainer.is_global_zero:
        beside.replace(path)
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
        raise Refused(f"{path} cannot be read as weights: {reason}") from None
    wanted = without_training_state(module, module.state_dict())
    weights = without_training_state(module, weights)
    for name in sorted(wanted.keys() | weights.keys()):
        have, want = (tuple(side[name].shape) if name in side else "nothing" for side in (weights, wanted))
        if have != want:
            raise Refused(f"{path} does not fit this model: '{name}' is {have} there, the model needs {want}")
    module.load_state_dict(weights, strict=False)


def without_training_state(method: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a method's weights is used after training: all but the parts that it calls `training_state`.

    Args:
        method: a method, or its class.
        weights: its state.
    """
    parts = tuple(f"{part}." for part in getattr(method, "training_state", ()))
    return {name: tensor for name, tensor in weights.items() if not (parts and name.startswith(parts))}
