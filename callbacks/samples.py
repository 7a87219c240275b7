"""A picture to look at after every validation: input, prediction, original side by side."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.utils import save_image


class Samples(Callback):
    """Writes the first validation pictures of this run as `<images seen>.png`, one row each.

    Expects the outputs {"input", "prediction", "target"}, NCHW in [0, 1]; a smaller input is shown with its own pixels.

    Args:
        folder: where they go.
        count: how many pictures.
    """

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.folder, self.count = folder, count
        self.rows: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start a new picture."""
        self.rows = []

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take a row from the first batches of the main process."""
        if trainer.is_global_zero and not trainer.sanity_checking and len(self.rows) < self.count:
            target = outputs["target"][:1].float()
            shown = F.interpolate(outputs["input"][:1].float(), size=target.shape[-2:], mode="nearest")
            row = torch.cat([shown, outputs["prediction"][:1].float(), target], dim=3)
            self.rows.append(row.clamp(0, 1).cpu())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write it."""
        if self.rows and trainer.state.fn == "fit":
            self.folder.mkdir(parents=True, exist_ok=True)
            width = max(row.shape[3] for row in self.rows)
            rows = [F.pad(row, (0, width - row.shape[3], 0, 4), value=1.0) for row in self.rows]
            save_image(torch.cat(rows, dim=2), self.folder / f"{pl_module.images_seen:09d}.png")
