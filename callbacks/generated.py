"""What all measures of generated images share: what is kept of each sample, gathered from all processes, measured once."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class GeneratedImages(Callback, ABC):
    """Measures the samples of a validation or test against the real sets of the datamodule; logs `<data set>/<protocol>`.

    Expects the outputs {"prediction": (N, C, H, W) in [0, 1], "index": (N,)}, and of the datamodule `real`, uint8 images by
    the name of their set. Samples are put into the order of their numbers first, so that the figures do not depend on the
    size of batches and the number of processes.

    Args:
        while_training: measure at validations too; else at tests alone.
    """

    def __init__(self, while_training: bool = False) -> None:
        self.while_training = while_training
        self.figures: dict[str, dict[str, dict[str, float]]] = {}
        self.kept: list[tuple[Tensor, Tensor]] = []

    @abstractmethod
    def keep(self, images: Tensor) -> Tensor:
        """What is kept of images (N, C, H, W) in [0, 1], on the CPU: (N, ...)."""

    @abstractmethod
    def measure(self, made: Tensor, real: Tensor, trainer: Any) -> dict[str, float]:
        """The figures by their protocols.

        Args:
            made: what was kept of all samples.
            real: uint8 images (N, C, H, W).
            trainer: whose datamodule and processes these are.
        """

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget earlier samples, those of the sanity check too."""
        self.kept = []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what is needed of a batch of samples."""
        if self._idle(trainer):
            return
        self.kept.append((outputs["index"].cpu(), self.keep(outputs["prediction"].detach().float())))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, and log."""
        if self._idle(trainer):
            return
        made = in_order(self.kept, trainer.world_size)
        self.kept = []
        self.figures = {
            name: {"all": self.measure(made, real.pixels, trainer)} for name, real in trainer.datamodule.real.items()
        }
        logged = {f"{name}/{key}": value for name, of_set in self.figures.items() for key, value in of_set["all"].items()}
        images = {"images": float(pl_module.images_seen)} if trainer.state.fn == "fit" else {}
        pl_module.log_dict({**logged, **images}, sync_dist=False)

    on_test_epoch_end = on_validation_epoch_end

    def _idle(self, trainer: Any) -> bool:
        return trainer.sanity_checking or (trainer.state.fn != "test" and not self.while_training)


def in_order(shares: Sequence[tuple[Tensor, Tensor]], world_size: int) -> Tensor:
    """Parts of all processes, each with its items' numbers, as one tensor in the order of the numbers."""
    mine = list(shares)
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, mine)
        mine = [part for share in gathered for part in share]
    numbers = torch.cat([part[0] for part in mine])
    return torch.cat([part[1] for part in mine])[numbers.argsort()]


def eight_bit(images: Tensor) -> Tensor:
    """Images in [0, 1] as a file of 8 bits would hold them: uint8."""
    return (images * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)
