"""What the super-resolution methods share: the pixel loss on what valid convolutions leave, and the evaluation steps."""

import torch.nn.functional as F
from torch import Tensor, nn

from modules.method import Batch, Method


class SuperResolutionMethod(Method):
    """A network that enlarges (N, 1, h, w) luma by `scale`.

    Networks are trained without padding, on patches that carry their context, and see replicated borders afterwards: no
    weight is spent on the zeros that padding would put around every patch.

    Args:
        scale: enlargement, an integer.
        images, learning_rate, warmup: see `Method`.
    """

    def __init__(self, scale: int, images: int, learning_rate: float, warmup: int = 0) -> None:
        super().__init__(images, learning_rate, warmup)
        self.scale = scale

    def enlarge(self, low: Tensor) -> Tensor:
        """The network without padding: (N, 1, h, w) to somewhat less than (N, 1, h * scale, w * scale)."""
        raise TypeError(f"{type(self).__name__} has no network without padding")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error over the pixels that the unpadded network predicts."""
        prediction = self.enlarge(batch["input"])
        return {"mse": F.mse_loss(prediction, centre(batch["target"], prediction.shape[-2:]))}

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The enlarged picture beside its original; what it is worth, callbacks say."""
        return {**batch, "prediction": self(batch["input"])}

    test_step = validation_step
    predict_step = validation_step


def centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The central part of (..., H, W), of the given height and width; margins are even."""
    top, left = ((have - want) // 2 for have, want in zip(image.shape[-2:], size, strict=True))
    return image[..., top : top + size[0], left : left + size[1]]


def pad_replicate(image: Tensor, margin: int) -> Tensor:
    """Continue a picture's border by `margin` pixels on every side."""
    return F.pad(image, (margin,) * 4, mode="replicate")


def margin_of(network: nn.Sequential) -> int:
    """How many pixels a chain of unpadded, odd, unstrided convolutions takes from every side."""
    return sum(layer.kernel_size[0] // 2 for layer in network if isinstance(layer, nn.Conv2d))
