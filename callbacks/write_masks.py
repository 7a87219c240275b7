"""Writes predicted masks as they come."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from callbacks.overlays import overlay


class WriteMasks(BasePredictionWriter):
    """Writes each picture's class ids as a grey PNG, and beside it a copy of the picture with the classes in colours.

    Args:
        targets: where each mask goes, by its picture's "path"; the copy's name ends in "-overlay".
    """

    def __init__(self, targets: dict[str, Path]) -> None:
        super().__init__("batch")
        self.targets = targets

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one picture's two files and say so."""
        target = self.targets[prediction["path"]]
        mask = prediction["prediction"][0].cpu()
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.numpy()).save(target)
        shown = (overlay(prediction["image"][0], mask) * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(shown.numpy()).save(target.with_name(f"{target.stem}-overlay.png"))
        height, width = mask.shape
        print(f"{prediction['path']}  {width}x{height}  ->  {target}", flush=True)
