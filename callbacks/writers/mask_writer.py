"""Writes predicted masks as they come."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from callbacks.visualization.overlays import overlay


class MaskWriter(BasePredictionWriter):
    """Writes each picture's class ids as a grey PNG, and below `overlays` a copy of the picture with the classes in colours.

    Args:
        targets: where each mask goes, by its picture's "path".
        output: the folder that they are in.
    """

    def __init__(self, targets: dict[str, Path], output: Path) -> None:
        super().__init__("batch")
        self.targets, self.output = targets, output

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
        target, photo = self.targets[prediction["path"]], prediction["photo"].cpu()
        found = prediction["prediction"].cpu()[None]  # (1, 1, h, w), perhaps smaller than the photo
        mask = F.interpolate(found, photo.shape[-2:], mode="nearest-exact")[0, 0]
        shown = (overlay(photo.float() / 255, mask) * 255).round().byte().permute(1, 2, 0)
        beside = self.output / "overlays" / target.relative_to(self.output)
        for path, pixels in ((target, mask), (beside, shown)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)
        print(f"{prediction['path']}  {mask.shape[1]}x{mask.shape[0]}  ->  {target}", flush=True)
