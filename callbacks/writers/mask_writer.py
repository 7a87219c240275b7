"""Writer of predicted masks."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from datamodules.errors import escape_controls
from datamodules.io.user_images import read_scale
from datamodules.transforms.overlays import COLORS, overlay


class MaskWriter(BasePredictionWriter):
    """Callback that writes the class ids of each image as a gray PNG, and a color overlay to the folder `overlays`.

    The files keep the size of a pixel of the input. A stack of pages gives a stack of masks and a stack of overlays, as TIFF
    files. The file `classes.csv` contains the id, the name and the color of each class.

    Args:
        targets: output file of each mask, by the "path" of its image.
        output: folder of the output files.
        class_names: names of the classes by id.
        class_colors: color (R, G, B) of each class, from 0 to 255; empty for the colors of `overlay`.
    """

    def __init__(
        self,
        targets: dict[str, Path],
        output: Path,
        class_names: Sequence[str] = (),
        class_colors: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        super().__init__("batch")
        self.targets, self.output, self.class_names = targets, output, class_names
        self.colors = torch.tensor(class_colors)[1:] / 255 if class_colors else COLORS

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the names and colors of the classes."""
        if not trainer.is_global_zero or not self.class_names:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        with (self.output / "classes.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["id", "name", "red", "green", "blue"])
            for i, name in enumerate(self.class_names):
                color = (self.colors[(i - 1) % len(self.colors)] * 255).round().int().tolist() if i else ["", "", ""]
                table.writerow([i, name, *color])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the folder of the overlays."""
        if trainer.is_global_zero:
            print(
                f"overlays  {self.output / 'overlays'}  (in color; the masks contain class ids, so they look black)", flush=True
            )

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
        """Write the two files of one image or stack, and print its name."""
        target, pages = self.targets[prediction["path"]], prediction["photo"].cpu()
        class_ids = prediction["prediction"].cpu()[:, None]  # (P, 1, h, w), may be smaller than the pages
        masks = F.interpolate(class_ids, pages.shape[-2:], mode="nearest-exact")[:, 0]
        overlays = [overlay(page.float() / 255, mask, colors=self.colors) for page, mask in zip(pages, masks, strict=True)]
        is_stack = len(masks) > 1
        source = Path(prediction["path"])
        scale = read_scale(source, is_stack)
        save_pages(masks, target, scale)
        save_pages(
            [(image * 255).round().byte().permute(1, 2, 0) for image in overlays],
            self.output / "overlays" / target.relative_to(self.output),
            scale,
        )
        size = f"{masks.shape[2]}x{masks.shape[1]}" + (f", {len(masks)} pages" if is_stack else "")
        print(escape_controls(f"{source}  {size}  ->  {target}"), flush=True)


def save_pages(pages: Sequence[Tensor] | Tensor, path: Path, scale: dict[str, Any]) -> None:
    """Write an image, or the pages of a stack, uint8 (H, W) or (H, W, 3) each, with the size of its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = (Image.fromarray(page.numpy()) for page in pages)
    stack: dict[str, Any] = {"save_all": True, "append_images": others, "compression": "tiff_adobe_deflate"} if others else {}
    first.save(path, **stack, **scale)
