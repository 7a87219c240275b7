"""What measures of whole pictures share: what is kept of each, gathered from all processes, and put together set by set."""

from abc import ABC, abstractmethod
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import Callback


class PerPicture(Callback, ABC):
    """Measures validation and test pictures and logs `<data set>/<protocol>`.

    Expects outputs with "name" and "dataset", N strings each. What is kept of a picture hangs on that picture alone, so that
    the figures are the same for any batch size and any number of processes.

    Args:
        while_training: measure at validations too; else at tests alone.
    """

    def __init__(self, while_training: bool = True) -> None:
        self.while_training = while_training
        self.kept: dict[str, dict[str, Any]] = {}
        self.figures: dict[str, dict[str, dict[str, float]]] = {}

    @abstractmethod
    def keep(self, outputs: dict[str, Any], i: int) -> Any:
        """What is kept of the picture number `i` of a batch, on the CPU."""

    @abstractmethod
    def put_together(self, kept: list[Any], trainer: Any) -> dict[str, float]:
        """A set's figures by their protocols, from what was kept of its pictures, in the order of their names."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget earlier pictures, those of the sanity check too."""
        self.kept = {}

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
        """Measure each picture of a batch."""
        if self._idle(trainer):
            return
        for i, (data_set, picture) in enumerate(zip(outputs["dataset"], outputs["name"], strict=True)):
            self.kept.setdefault(data_set, {})[picture] = self.keep(outputs, i)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Gather what all processes have kept, put it together, and log."""
        if self._idle(trainer):
            return
        shares = [self.kept]
        if trainer.world_size > 1:
            shares = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(shares, self.kept)
        whole: dict[str, dict[str, Any]] = {}
        for share in shares:
            for data_set, pictures in share.items():
                whole.setdefault(data_set, {}).update(pictures)
        self.kept = {}
        self.figures = {
            data_set: {"all": self.put_together([pictures[name] for name in sorted(pictures)], trainer)}
            for data_set, pictures in sorted(whole.items())
        }
        logged = {f"{name}/{key}": value for name, of_set in self.figures.items() for key, value in of_set["all"].items()}
        images = {"images": float(pl_module.images_seen)} if trainer.state.fn == "fit" else {}
        pl_module.log_dict({**logged, **images}, sync_dist=False)

    on_test_epoch_end = on_validation_epoch_end

    def _idle(self, trainer: Any) -> bool:
        return trainer.state.fn == "fit" and not self.while_training
