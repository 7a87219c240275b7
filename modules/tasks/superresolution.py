"""What the super-resolution methods share: the pixel loss on what valid convolutions leave, and the evaluation steps."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.networks.crop import center_crop
from modules.training.method import Batch, Method


class SuperResolutionMethod(Method):
    """A network that enlarges (N, 1, h, w) luma by `scale`.

    Networks are trained without padding, on patches that carry their context, and see replicated borders afterwards: no
    weight is spent on the zeros that padding would put around every patch.

    Args:
        scale: enlargement, an integer.
        total_images, learning_rate, warmup: see `Method`.
    """

    def __init__(self, scale: int, total_images: int, learning_rate: float, warmup: int = 0) -> None:
        super().__init__(total_images, learning_rate, warmup)
        self.scale = scale

    def forward_valid(self, lr_image: Tensor) -> Tensor:
        """The network without padding: (N, 1, h, w) to somewhat less than (N, 1, h * scale, w * scale)."""
        raise TypeError(f"{type(self).__name__} has no network without padding")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error over the pixels that the unpadded network predicts."""
        prediction = self.forward_valid(batch["input"])
        return {"mse": F.mse_loss(prediction, center_crop(batch["target"], prediction.shape[-2:]))}

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The enlarged picture beside its original; what it is worth, callbacks say."""
        return {**batch, "prediction": self(batch["input"])}

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The enlarged picture, of any size: memory does not grow with its height."""
        return {**batch, "prediction": predict_in_strips(self, batch["input"], self.scale)}


def predict_in_strips(
    network: Callable[[Tensor], Tensor], lr_image: Tensor, scale: int, pixels: int = 2**20, context: int = 8
) -> Tensor:
    """Enlarge a picture in horizontal bands of at most about `pixels`; the result is that of the whole.

    Args:
        network: (N, 1, h, w) to (N, 1, h * scale, w * scale).
        lr_image: (N, 1, h, w).
        scale: enlargement.
        pixels: of a band.
        context: rows, beyond a band's own, that its outermost pixels depend on.
    """
    height, width = lr_image.shape[-2:]
    rows = max(context, pixels // width)
    strips = []
    for top in range(0, height, rows):
        above = min(top, context)
        strip = network(lr_image[..., top - above : top + rows + context, :])
        strips.append(strip[..., above * scale : (above + rows) * scale, :])
    return torch.cat(strips, dim=-2)


def pad_replicate(image: Tensor, margin: int) -> Tensor:
    """Continue a picture's border by `margin` pixels on every side."""
    return F.pad(image, (margin,) * 4, mode="replicate")


def valid_conv_margin(network: nn.Sequential) -> int:
    """How many pixels a chain of unpadded, odd, unstrided convolutions takes from every side."""
    return sum(layer.kernel_size[0] // 2 for layer in network if isinstance(layer, nn.Conv2d))
