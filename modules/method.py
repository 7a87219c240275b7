"""The base of every method: one training path, counted in images seen."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.refused import Refused
from modules.gradients import step
from modules.lightning_adapter import LeanModule, align_log_axis, count_step, lean_loop, log_every

Batch = dict[str, Any]


class NonFiniteLoss(Refused):
    """The loss has become infinite or not a number; the message names the term and the images seen."""


class Method(LeanModule):
    """A network with its loss, trained by manual optimization.

    A method defines `losses` and `configure_optimizers`; what a training step does around them stands here. Progress is
    counted in images seen by all processes together, so that a schedule means the same for any batch size and any number
    of devices.

    Args:
        images: training budget, in images (patches) seen; the run stops there.
        learning_rate: its highest value.
        warmup: images over which the learning rate rises linearly from zero; it then falls to zero along a half cosine.
    """

    def __init__(self, images: int, learning_rate: float, warmup: int = 0) -> None:
        super().__init__()
        if images < 1:
            raise Refused(f"model.images: {images} is not a budget, at least 1 image is needed")
        self.automatic_optimization = False
        self.images = images
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.images_seen = 0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss on one batch, by name; their sum is minimised."""
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def schedule(self, images_seen: int) -> float:
        """The learning rate after that many images."""
        if images_seen < self.warmup:
            return self.learning_rate * (images_seen + 1) / self.warmup
        progress = min(1.0, (images_seen - self.warmup) / max(1, self.images - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step on one batch."""
        (optimizer,) = self.trainer.optimizers
        learning_rate = self.schedule(self.images_seen)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        terms = self.losses({key: self._cast(value) for key, value in batch.items()})
        step(self.trainer, optimizer, torch.stack(list(terms.values())).sum())

        count_step(self.trainer)
        self.images_seen += len(batch["input"]) * self.trainer.world_size
        if self.images_seen >= self.images:
            self.trainer.should_stop = True
        # Reading a loss makes the host wait for the device, so it is done only when it is logged.
        if self.trainer.should_stop or (batch_idx + 1) % log_every(self.trainer) == 0:
            self._log(terms, learning_rate)

    def _cast(self, value: Any) -> Any:
        """Data made on the device after Lightning's own conversion, in the precision of the weights."""
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _log(self, terms: dict[str, Tensor], learning_rate: float) -> None:
        values = torch.stack([value.detach() for value in terms.values()])
        if self.trainer.world_size > 1:  # shares are equal: the mean is the whole batch's
            dist.all_reduce(values)
            values /= self.trainer.world_size
        for name, value in zip(terms, values.tolist(), strict=True):
            if not math.isfinite(value):  # every process sees the same value, and all of them stop
                raise NonFiniteLoss(
                    f"loss '{name}' is {value} after {self.images_seen} images; "
                    f"lower model.learning_rate (now {self.learning_rate})"
                )
            self.log(f"train/{name}", value)
        self.log_dict({"learning_rate": learning_rate, "images": float(self.images_seen)})

    def on_train_start(self) -> None:
        """A step does what it must; a run that has seen all its images takes none."""
        lean_loop(self.trainer)
        self.trainer.should_stop = self.images_seen >= self.images

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """The logged step is the batch, in a resumed run too."""
        align_log_axis(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The images seen travel with the weights, and what else a run must share to be the same run bit for bit."""
        checkpoint["images_seen"] = self.images_seen
        checkpoint["processes"] = self.trainer.world_size
        checkpoint["precision"] = str(self.trainer.precision)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `on_save_checkpoint`."""
        self.images_seen = checkpoint["images_seen"]
