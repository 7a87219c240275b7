"""Writer of upscaled or translated images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from datamodules.io.user_images import merge_channels


class ImageWriter(BasePredictionWriter):
    """Callback that writes each prediction as a PNG: a color image, or luma combined with the chroma of the input.

    Args:
        targets: output file of each image, by its "path".

    Attributes:
        verbose: print the name of each image.
    """

    def __init__(self, targets: dict[str, Path]) -> None:
        super().__init__("batch")
        self.targets, self.verbose = targets, True

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
        """Write one image."""
        predicted = prediction["prediction"][0].float().cpu()
        image = merge_channels(predicted, prediction["chroma"].cpu(), prediction["alpha"].cpu())
        target = self.targets[prediction["path"]]
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
        if self.verbose:
            print(f"{prediction['path']}  {prediction['size']}  ->  {target}  {image.width}x{image.height}", flush=True)
