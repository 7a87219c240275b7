"""Preview images: real images once, and the method's previews after each validation."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.utils import save_image

from datamodules.transforms.draw import PREVIEW_IMAGES, image_grid


class PreviewImages(Callback):
    """Callback that writes a preview after every validation as `<images seen>.png`, and to loggers that accept images.

    `Method.preview` draws previews of the first outputs of rank 0. Up to `Method.preview_limit` previews of each
    `Method.preview_group` are stacked. If the datamodule has real images for comparison with samples, the first ones are
    written as `reals.png` before the first step.

    Args:
        folder: output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.previews: list[Tensor] = []
        self.groups: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write real images, for comparison with samples."""
        if trainer.is_global_zero and pl_module.images_seen == 0:
            real = trainer.datamodule.preview_images(PREVIEW_IMAGES)
            if real is not None:
                self._write(trainer, "reals", image_grid(real))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Discard earlier previews."""
        self.previews, self.groups = [], []

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect previews from the first batches of rank 0."""
        if not trainer.is_global_zero or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        group = pl_module.preview_group(outputs)
        if self.groups.count(group) < pl_module.preview_limit:
            self.groups.append(group)
            self.previews.append(pl_module.preview(outputs))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the preview."""
        if self.previews:
            width = max(preview.shape[3] for preview in self.previews)
            rows = [F.pad(preview, (0, width - preview.shape[3], 0, 4), value=1.0) for preview in self.previews]
            self._write(trainer, f"{pl_module.images_seen:09d}", torch.cat(rows, dim=2))

    def _write(self, trainer: Any, name: str, image: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.png"
        save_image(image, path)
        for logger in trainer.loggers:
            title = "samples" if name.isdigit() else name
            if hasattr(logger, "log_image"):
                logger.log_image(title, [str(path)])
            elif hasattr(getattr(logger, "experiment", None), "add_image"):  # TensorBoard
                logger.experiment.add_image(title, image[0].clamp(0, 1), trainer.global_step)
