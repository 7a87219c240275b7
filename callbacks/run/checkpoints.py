"""Checkpoints: the latest state to resume from, and the best weights to evaluate."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from datamodules.errors import UserError
from modules.networks.weights import LOAD_ERRORS, read_weights_file
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and plain data; tensors are memory-mapped.

    Raises:
        UserError: the file cannot be read, is damaged, or is not a checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except LOAD_ERRORS:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} cannot be read as weights: it is damaged, or not a checkpoint (.ckpt, .safetensors)")
    return content


@runtime_checkable
class HasAuthorsWeights(Protocol):
    """A method that can use weights of its authors."""

    def authors_weights(self) -> Path | None:
        """Return the file of the weights, downloaded if it is missing; None if there is none."""

    def rename_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights with the names of this method; others unchanged."""
        ...


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint (.ckpt), of committed weights (.safetensors) or of a file of torch (.pth), by name.

    Raises:
        UserError: see `read_checkpoint` and `read_weights_file`.
    """
    return read_weights_file(path) if path.suffix in (".safetensors", ".pth") else read_checkpoint(path)["state_dict"]


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Return the first 16 hex digits of the sha256 of names and values.

    The hash of a checkpoint equals that of the committed weights exported from it.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_weights(module: L.LightningModule, path: Path) -> None:
    """Load the weights of a file into a module, see `read_weights`; a method can rename those of its authors' code.

    Raises:
        UserError: the file does not contain the weights of this module; the message names the file and the first difference.
    """
    weights = read_weights(path)
    if isinstance(module, HasAuthorsWeights):
        weights = module.rename_weights(weights)
    weights = inference_state_dict(module, weights)
    expected = inference_state_dict(module, module.state_dict())
    for name in sorted(expected.keys() | weights.keys()):
        shape, expected_shape = (
            tuple(tensors[name].shape) if name in tensors else "nothing" for tensors in (weights, expected)
        )
        if shape != expected_shape:
            raise UserError(
                f"{path} does not fit this model: for '{name}', the file has {shape}, but the model needs {expected_shape}. "
                "Use weights of the same recipe"
            )
    module.load_state_dict(weights, strict=False)


def inference_state_dict(method: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that are used after training, as they are committed.

    They exclude those of the method's `training_only_modules`, and are rounded to its `inference_dtype` if it has one.

    Args:
        method: a method, or its class.
        weights: state dict of the method.
    """
    prefixes = tuple(f"{prefix}." for prefix in getattr(method, "training_only_modules", ()))
    used = {name: tensor for name, tensor in weights.items() if not (prefixes and name.startswith(prefixes))}
    dtype = getattr(method, "inference_dtype", None)
    return {name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in used.items()}
