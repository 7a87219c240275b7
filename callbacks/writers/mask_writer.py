"""Writer of predicted masks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from datamodules.transforms.overlays import overlay


class MaskWriter(BasePredictionWriter):
    """Callback that writes the class ids of each image as a gray PNG, and a color overlay to the folder `overlays`.

    Args:
        targets: output file of each mask, by the "path" of its image.
        output: folder of the output files.
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
        """Write the two files of one image and print its name."""
        target, image = self.targets[prediction["path"]], prediction["photo"].cpu()
        class_ids = prediction["prediction"].cpu()[None]  # (1, 1, h, w), may be smaller than the photo
        mask = F.interpolate(class_ids, image.shape[-2:], mode="nearest-exact")[0, 0]
        overlaid = (overlay(image.float() / 255, mask) * 255).round().byte().permute(1, 2, 0)
        overlay_path = self.output / "overlays" / target.relative_to(self.output)
        for path, pixels in ((target, mask), (overlay_path, overlaid)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)
        print(f"{prediction['path']}  {mask.shape[1]}x{mask.shape[0]}  ->  {target}", flush=True)
