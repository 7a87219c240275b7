"""Writes enlarged pictures as they come."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from datamodules.photos import put_together


class WritePhotos(BasePredictionWriter):
    """Puts each predicted luma together with its picture's colour and writes it as PNG.

    Args:
        targets: where each picture goes, by its "path".
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
        """Write one picture and say so."""
        target = self.targets[prediction["path"]]
        luma = prediction["prediction"][0].cpu()
        image = put_together(luma, prediction["chroma"].cpu(), prediction["alpha"].cpu())
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
        height, width = prediction["input"].shape[-2:]
        print(f"{prediction['path']}  {width}x{height}  ->  {target}  {image.width}x{image.height}", flush=True)
