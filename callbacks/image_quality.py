"""PSNR and SSIM of restored pictures, as named protocols."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from datamodules.refused import Refused


def psnr_y(prediction: Tensor, target: Tensor, shave: int) -> Tensor:
    """Peak signal-to-noise ratio in dB: 10 log10(255**2 / MSE) over 8-bit luma, borders left out.

    The setting of the SRCNN, ESPCN and SRGAN tables: clip, round to 8 bits, drop `shave` (the scale) pixels on every side;
    the mean over a data set is that of the dB values. A perfect picture has infinity.

    Args:
        prediction, target: (N, 1, H, W) in [0, 1].
        shave: pixels.

    Returns:
        float64 (N,).
    """
    error = _levels(prediction, shave) - _levels(target, shave)
    return 10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3)))


def ssim_y(prediction: Tensor, target: Tensor, shave: int) -> Tensor:
    """Structural similarity (Wang et al., 2004) of 8-bit luma as their ``ssim_index.m`` computes it, borders left out.

    11 x 11 Gaussian window with sigma 1.5, K = (0.01, 0.03), L = 255; only windows that lie wholly inside count
    (torchmetrics counts windows over a mirrored border too).

    Args:
        prediction, target: (N, 1, H, W) in [0, 1], at least 11 pixels high and wide after shaving.
        shave: pixels.

    Returns:
        float64 (N,).
    """
    x, y = _levels(prediction, shave), _levels(target, shave)
    if min(x.shape[-2:]) < 11:
        raise Refused(f"SSIM needs 11x11 pixels within the shaved border, not {x.shape[-1]}x{x.shape[-2]}")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y, xx, yy, xy = (_window(image) for image in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _window(image: Tensor) -> Tensor:
    """Weighted mean over each 11 x 11 Gaussian window that lies inside: (N, 1, H, W) to (N, 1, H - 10, W - 10)."""
    weights = torch.exp(-((torch.arange(11, dtype=image.dtype, device=image.device) - 5) ** 2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(image, weights.view(1, 1, 11, 1)), weights.view(1, 1, 1, 11))


def _levels(image: Tensor, shave: int) -> Tensor:
    """8-bit levels as float64, shaved; on the CPU, since not every device has double precision."""
    levels = (image.detach().cpu().double() * 255 + 0.5).floor().clamp(0, 255)
    return levels[..., shave : levels.shape[-2] - shave, shave : levels.shape[-1] - shave]


def protocols(shave: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The measures by their protocol's name, for a border of `shave` pixels."""
    return {f"psnr/y-shave{shave}": partial(psnr_y, shave=shave), f"ssim/y-shave{shave}": partial(ssim_y, shave=shave)}


class ImageQuality(Callback):
    """Measures validation and test pictures; logs the mean of each data set as `<data set>/<protocol>`.

    Expects the outputs {"prediction", "target"}, (N, 1, H, W) in [0, 1], with "name" and "dataset", N strings each. The
    figures are the same for any batch size and any number of processes: each picture's own are kept, under its name, and
    gathered as such (torchmetrics gathers a state at a time, which every process must have; a small set reaches only some).

    Args:
        shave: border in pixels, by custom the scale.
    """

    def __init__(self, shave: int) -> None:
        self.protocols = protocols(shave)
        self.figures: dict[str, dict[str, dict[str, float]]] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Forget earlier figures, those of the sanity check too."""
        self.figures = {}

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure each picture of a batch."""
        values = {name: f(outputs["prediction"], outputs["target"]) for name, f in self.protocols.items()}
        for i, (data_set, picture) in enumerate(zip(outputs["dataset"], outputs["name"], strict=True)):
            of_set = self.figures.setdefault(data_set, {})
            of_set[picture] = {name: value[i].item() for name, value in values.items()}

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Gather the pictures of all processes and log the means."""
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(shares, self.figures)
            self.figures = {}
            for share in shares:
                for data_set, pictures in share.items():
                    self.figures.setdefault(data_set, {}).update(pictures)
        images = {"images": float(pl_module.images_seen)} if trainer.state.fn == "fit" else {}
        pl_module.log_dict({**self.means(), **images}, sync_dist=False)

    on_test_epoch_end = on_validation_epoch_end

    def means(self) -> dict[str, float]:
        """Mean over the pictures of each data set, in the order of their names, by `<data set>/<protocol>`."""
        return {
            f"{data_set}/{protocol}": sum(pictures[name][protocol] for name in sorted(pictures)) / len(pictures)
            for data_set, pictures in self.figures.items()
            for protocol in self.protocols
        }
