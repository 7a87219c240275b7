"""Preview images: training examples once, and predictions after each validation."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.utils import make_grid, save_image

from callbacks.visualization.overlays import comparison_row


class PreviewImages(Callback):
    """Writes a preview after every validation as `<images seen>.png`, and to loggers that accept images.

    The layout depends on the keys of the outputs:

    - "target": rows of input, prediction, target; a smaller input is enlarged to the size of the target by nearest neighbor.
    - "mask": rows of image, truth, prediction, errors.
    - "reconstruction": rows of image, translation, reconstruction, the same number in each direction.
    - "code": a grid of images above their reconstructions, with "input" between them if it differs from the image.
    - otherwise: a square grid of samples, of the same latents each time; real images are written as `reals.png` before the
      first step. Samples that are points of the plane, (N, 2), are plotted over real points.

    All images are NCHW in [0, 1].

    Args:
        folder: output folder.
        rows: number of rows with a target, a mask, or a reconstruction.
        sheet: number of samples in a grid.
    """

    def __init__(self, folder: Path, rows: int = 3, sheet: int = 64) -> None:
        self.folder, self.rows, self.sheet = folder, rows, sheet
        self.preview_rows: list[Tensor] = []
        self.points: list[Tensor] = []
        self.directions: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write real images, for comparison with samples."""
        if trainer.is_global_zero and pl_module.images_seen == 0 and hasattr(trainer.datamodule, "preview_images"):
            real = trainer.datamodule.preview_images(self.sheet)
            if real.ndim == 4:
                self._write(trainer, "reals", image_grid(real))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start a new preview."""
        self.preview_rows, self.points, self.directions = [], [], []

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the preview from the first batches of rank 0."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        if "reconstruction" in outputs:
            self.directions += outputs["direction"][:1]
            if self.directions.count(outputs["direction"][0]) <= self.rows:
                panels = [outputs[name][:1].float() for name in ("image", "prediction", "reconstruction")]
                self.preview_rows.append(torch.cat(panels, dim=3).clamp(0, 1).cpu())
        elif "mask" in outputs:
            if len(self.preview_rows) < self.rows:
                self.preview_rows.append(
                    comparison_row(outputs["image"][0], outputs["prediction"][0].argmax(0), outputs["mask"][0])
                )
        elif "code" in outputs:
            if batch_idx == 0:
                panels = [outputs[name][: self.sheet // 4] for name in ("image", "input", "prediction") if name in outputs]
                self.preview_rows = [stack_rows(*panels)]
        elif "target" not in outputs:
            if outputs["prediction"].ndim == 2:  # points, collected into one plot
                self.points.append(outputs["prediction"].float().cpu())
            elif batch_idx == 0:
                self.preview_rows = [image_grid(outputs["prediction"][: self.sheet])]
        elif len(self.preview_rows) < self.rows:
            target = outputs["target"][:1].float()
            resized = F.interpolate(outputs["input"][:1].float(), size=target.shape[-2:], mode="nearest")
            self.preview_rows.append(torch.cat([resized, outputs["prediction"][:1].float(), target], dim=3).clamp(0, 1).cpu())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the preview."""
        if self.points:
            self.preview_rows = [scatter_plot(torch.cat(self.points), trainer.datamodule.preview_images(1000))]
        if self.preview_rows and trainer.state.fn == "fit":
            width = max(row.shape[3] for row in self.preview_rows)
            rows = [F.pad(row, (0, width - row.shape[3], 0, 4), value=1.0) for row in self.preview_rows]
            self._write(trainer, f"{pl_module.images_seen:09d}", torch.cat(rows, dim=2))

    def _write(self, trainer: Any, name: str, image: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.png"
        save_image(image, path)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples" if name.isdigit() else name, [str(path)])


def image_grid(images: Tensor) -> Tensor:
    """Arrange images (N, C, H, W) in a nearly square grid: one image (1, 3, H', W')."""
    columns = max(1, round(len(images) ** 0.5))
    return make_grid(images.float().clamp(0, 1).cpu(), nrow=columns, padding=2, pad_value=1.0)[None]


def stack_rows(*rows: Tensor) -> Tensor:
    """Stack rows of images (N, C, H, W) vertically: one image (1, 3, H', W')."""
    images = torch.stack([row.float().clamp(0, 1).cpu() for row in rows])
    return make_grid(images.flatten(0, 1), nrow=images.shape[1], padding=2, pad_value=1.0)[None]


def scatter_plot(points: Tensor, real: Tensor, side: int = 360) -> Tensor:
    """Plot points (N, 2) in red over real points in gray: (1, 3, side, side), with the origin in the center."""
    extent = 1.2 * torch.cat([points, real]).abs().max().clamp(min=1e-6)
    image = torch.ones(3, side, side)
    for group, color in ((real, (0.7, 0.7, 0.7)), (points, (0.8, 0.1, 0.1))):
        columns, rows = ((group * torch.tensor([1, -1]) / extent + 1) / 2 * (side - 2)).long().T
        for dy in (0, 1):
            for dx in (0, 1):
                image[:, rows + dy, columns + dx] = torch.tensor(color)[:, None]
    return image[None]
