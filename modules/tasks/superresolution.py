"""Base class of super-resolution methods: pixel loss of unpadded networks, and evaluation steps."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.batches import SuperResolutionEvalBatch, SuperResolutionOutputs
from datamodules.errors import UserError
from datamodules.transforms.draw import image_row
from modules.networks.crop import center_crop
from modules.training.method import Batch, Method


class SuperResolutionMethod(Method):
    """Method that upscales images (N, C, h, w) by `scale`.

    Methods with `forward_valid` train unpadded networks on patches with context, so that the weights do not adapt to zero
    padding. Their evaluation replicates the image border instead.

    Args:
        scale: integer scale factor.
        total_images, learning_rate, warmup: see `Method`.

    Attributes:
        channels: C, 1 for luma or 3 for RGB.
        context: pixels beyond a strip of the input that its output depends on, see `predict_in_strips`.
    """

    channels = 1
    context = 8

    def __init__(self, scale: int, total_images: int, learning_rate: float, warmup: int = 0) -> None:
        super().__init__(total_images, learning_rate, warmup)
        self.scale = scale
        self.min_patch_size = 1  # LR pixels that the unpadded network needs

    def forward_valid(self, lr_image: Tensor) -> Tensor:
        """Apply the network without padding: (N, C, h, w) to slightly less than (N, C, h * scale, w * scale)."""
        raise TypeError(f"{type(self).__name__} has no network without padding")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the mean squared error over the pixels that the unpadded network predicts, as "mse".

        Raises:
            UserError: a patch is too small for the unpadded network.
        """
        if (side := min(batch["input"].shape[-2:])) < self.min_patch_size:
            raise UserError(f"data.patch_size: {side} is too small for the network. Use at least {self.min_patch_size} pixels")
        prediction = self.forward_valid(batch["input"])
        return {"mse": F.mse_loss(prediction, center_crop(batch["target"], prediction.shape[-2:]))}

    def validation_step(self, batch: SuperResolutionEvalBatch, batch_idx: int) -> SuperResolutionOutputs:
        """Add the upscaled image as "prediction"; callbacks compute the metrics."""
        return {**batch, "prediction": self.enlarge(batch["input"])}

    test_step = validation_step

    preview_limit = 3

    def preview(self, outputs: Batch) -> Tensor:
        """Draw the input enlarged by nearest-neighbor interpolation, the prediction and the target."""
        enlarged = F.interpolate(outputs["input"][:1].float(), size=outputs["target"].shape[-2:], mode="nearest")
        return image_row(enlarged, outputs["prediction"][:1], outputs["target"][:1])

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Add the upscaled image as "prediction"."""
        return {**batch, "prediction": self.enlarge(batch["input"])}

    def enlarge(self, lr_image: Tensor) -> Tensor:
        """Upscale images of any size, (N, C, h, w) to (N, C, h * scale, w * scale), in bounded memory."""
        return predict_in_strips(self, lr_image, self.scale, context=self.context)


def predict_in_strips(
    network: Callable[[Tensor], Tensor], lr_image: Tensor, scale: int, pixels: int = 2**22, context: int = 8
) -> Tensor:
    """Upscale an image in horizontal strips; the result equals that of a single pass.

    Args:
        network: function from (N, C, h, w) to (N, C, h * scale, w * scale).
        lr_image: (N, C, h, w).
        scale: integer scale factor.
        pixels: approximate number of output pixels of a strip.
        context: input rows above and below a strip that are passed to the network too; at least its receptive radius.

    Returns:
        (N, C, h * scale, w * scale).
    """
    height, width = lr_image.shape[-2:]
    rows = max(context, pixels // (width * scale**2))
    strips = []
    for top in range(0, height, rows):
        rows_above = min(top, context)
        strip = network(lr_image[..., top - rows_above : top + rows + context, :])
        strips.append(strip[..., rows_above * scale : (rows_above + rows) * scale, :])
    return torch.cat(strips, dim=-2)


def pad_replicate(image: Tensor, margin: int) -> Tensor:
    """Pad an image (N, C, H, W) with `margin` replicated border pixels on every side."""
    return F.pad(image, (margin,) * 4, mode="replicate")


def valid_conv_margin(network: nn.Sequential) -> int:
    """Return the pixels lost on every side in a chain of unpadded convolutions with odd kernel sizes and stride 1."""
    return sum(layer.kernel_size[0] // 2 for layer in network if isinstance(layer, nn.Conv2d))
