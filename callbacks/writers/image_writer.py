"""Writer of upscaled or translated images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from datamodules.errors import escape_controls
from datamodules.io.user_images import merge_channels, read_info


class ImageWriter(BasePredictionWriter):
    """Callback that writes each prediction as a PNG: a color image, or luma combined with the chroma of the input.

    It keeps the ICC profile, the EXIF data and the resolution of the input, and the 16 bits of a gray input.

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
        chroma, alpha = prediction["chroma"].cpu(), prediction["alpha"].cpu()
        mode = ("RGB" if chroma.numel() or len(predicted) == 3 else "L") + ("A" if alpha.numel() else "")
        info = read_info(Path(prediction["path"]), mode)
        image = merge_channels(predicted, chroma, alpha, info.bits if mode == "L" else 8)
        target = self.targets[prediction["path"]]
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, **info.options)
        if self.verbose:
            line = f"{prediction['path']}  {prediction['size']}  ->  {target}  {image.width}x{image.height}"
            print(escape_controls(line), flush=True)
