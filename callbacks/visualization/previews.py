"""Pictures to look at: what a network learns from, and what it makes of it by and by."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.utils import make_grid, save_image

from callbacks.visualization.overlays import comparison_row


class PreviewImages(Callback):
    """Writes a picture after every validation as `<images seen>.png`, and to the loggers that take pictures.

    Outputs with a "target" become one row a picture: input, prediction, original; a smaller input is shown with its own
    pixels. Those with a "mask" become picture, truth, prediction, mistakes; those with a "reconstruction" picture, translation,
    reconstruction, as many in each direction. Those with a "code" become a sheet of pictures, each above what comes back of it
    (between them, where the network saw something else, that "input"). Without any of these they are samples, always of the
    same numbers, and become a square sheet; the real images that they are to resemble are written as `reals.png` before the
    first step.

    All are NCHW in [0, 1]. Samples that are points of the plane, (N, 2), are drawn over the real ones.

    Args:
        folder: where they go.
        rows: how many pictures with a target, a mask, or a reconstruction.
        sheet: how many samples.
    """

    def __init__(self, folder: Path, rows: int = 3, sheet: int = 64) -> None:
        self.folder, self.rows, self.sheet = folder, rows, sheet
        self.shown: list[Tensor] = []
        self.points: list[Tensor] = []
        self.directions: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Show what is to be imitated."""
        if trainer.is_global_zero and pl_module.images_seen == 0 and hasattr(trainer.datamodule, "preview_images"):
            real = trainer.datamodule.preview_images(self.sheet)
            if real.ndim == 4:
                self._write(trainer, "reals", sheet(real))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start a new picture."""
        self.shown, self.points, self.directions = [], [], []

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take what is shown from the first batches of the main process."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        if "reconstruction" in outputs:
            self.directions += outputs["direction"][:1]
            if self.directions.count(outputs["direction"][0]) <= self.rows:
                parts = [outputs[name][:1].float() for name in ("image", "prediction", "reconstruction")]
                self.shown.append(torch.cat(parts, dim=3).clamp(0, 1).cpu())
        elif "mask" in outputs:
            if len(self.shown) < self.rows:
                self.shown.append(comparison_row(outputs["image"][0], outputs["prediction"][0].argmax(0), outputs["mask"][0]))
        elif "code" in outputs:
            if batch_idx == 0:
                parts = [outputs[name][: self.sheet // 4] for name in ("image", "input", "prediction") if name in outputs]
                self.shown = [stack_rows(*parts)]
        elif "target" not in outputs:
            if outputs["prediction"].ndim == 2:  # points, which belong into one picture
                self.points.append(outputs["prediction"].float().cpu())
            elif batch_idx == 0:
                self.shown = [sheet(outputs["prediction"][: self.sheet])]
        elif len(self.shown) < self.rows:
            target = outputs["target"][:1].float()
            shown = F.interpolate(outputs["input"][:1].float(), size=target.shape[-2:], mode="nearest")
            self.shown.append(torch.cat([shown, outputs["prediction"][:1].float(), target], dim=3).clamp(0, 1).cpu())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write it."""
        if self.points:
            self.shown = [scatter_plot(torch.cat(self.points), trainer.datamodule.preview_images(1000))]
        if self.shown and trainer.state.fn == "fit":
            width = max(shown.shape[3] for shown in self.shown)
            rows = [F.pad(shown, (0, width - shown.shape[3], 0, 4), value=1.0) for shown in self.shown]
            self._write(trainer, f"{pl_module.images_seen:09d}", torch.cat(rows, dim=2))

    def _write(self, trainer: Any, name: str, picture: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.png"
        save_image(picture, path)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples" if name.isdigit() else name, [str(path)])


def sheet(images: Tensor) -> Tensor:
    """Images (N, C, H, W) as one picture (1, 3, H', W'), as square as may be."""
    columns = max(1, round(len(images) ** 0.5))
    return make_grid(images.float().clamp(0, 1).cpu(), nrow=columns, padding=2, pad_value=1.0)[None]


def stack_rows(*rows: Tensor) -> Tensor:
    """Pictures that belong together below each other: (N, C, H, W) each, as one picture (1, 3, H', W')."""
    pictures = torch.stack([comparison_row.float().clamp(0, 1).cpu() for comparison_row in rows])
    return make_grid(pictures.flatten(0, 1), nrow=pictures.shape[1], padding=2, pad_value=1.0)[None]


def scatter_plot(points: Tensor, real: Tensor, side: int = 360) -> Tensor:
    """Points (N, 2), red, over real ones, grey, as a picture (1, 3, side, side); the origin is in the middle."""
    extent = 1.2 * torch.cat([points, real]).abs().max().clamp(min=1e-6)
    picture = torch.ones(3, side, side)
    for shown, colour in ((real, (0.7, 0.7, 0.7)), (points, (0.8, 0.1, 0.1))):
        columns, rows = ((shown * torch.tensor([1, -1]) / extent + 1) / 2 * (side - 2)).long().T
        for down in (0, 1):
            for across in (0, 1):
                picture[:, rows + down, columns + across] = torch.tensor(colour)[:, None]
    return picture[None]
