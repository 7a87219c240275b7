"""Operations that torch computes on GPUs in an order that varies, in a form that does not.

They are used on a GPU while `torch.use_deterministic_algorithms` is on (`--trainer.deterministic true`), where torch's own
operations raise an error. Everywhere else, torch's operations are used, which are faster and add in another order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_required(tensor: Tensor) -> bool:
    """Return whether operations on a tensor must be in the form of this module."""
    return tensor.is_cuda and torch.are_deterministic_algorithms_enabled()


class ReflectionPad2d(nn.ReflectionPad2d):
    """Reflection padding, see `reflect`; arguments and shapes are those of torch's class."""

    def forward(self, image: Tensor) -> Tensor:
        """Pad an image (N, C, H, W)."""
        return reflect(image, self.padding) if is_required(image) else super().forward(image)


class Conv2d(nn.Conv2d):
    """Convolution with padding by reflection, or by zeros; arguments and shapes are those of torch's class."""

    def forward(self, image: Tensor) -> Tensor:
        """Convolve an image (N, C, H, W)."""
        if self.padding_mode != "reflect" or not is_required(image):
            return super().forward(image)
        down, across = (int(side) for side in self.padding)
        padded = reflect(image, (across, across, down, down))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def reflect(image: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Pad by reflection with flips, of which each has a deterministic backward pass.

    Args:
        image: (..., H, W).
        padding: pixels on the left, on the right, above and below, each less than the side.

    Returns:
        (..., above + H + below, left + W + right).
    """
    left, right, above, below = padding
    width, height = image.shape[-1], image.shape[-2]
    columns = [image[..., 1 : left + 1].flip(-1), image, image[..., width - 1 - right : width - 1].flip(-1)]
    wide = torch.cat(columns, -1)
    rows = [wide[..., 1 : above + 1, :].flip(-2), wide, wide[..., height - 1 - below : height - 1, :].flip(-2)]
    return torch.cat(rows, -2)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Compute the cross-entropy of each pixel.

    Args:
        logits: (N, C, H, W).
        labels: class ids, (N, H, W); pixels with the value `ignore_index` have the loss 0.
        ignore_index: value of labels.

    Returns:
        (N, H, W).
    """
    if is_required(logits):
        return _pixel_cross_entropy(logits, labels, ignore_index)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")


def _pixel_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    by_pixel = logits.movedim(1, -1).flatten(0, -2)  # (N * H * W, C): torch's loss of vectors is deterministic
    return F.cross_entropy(by_pixel, labels.flatten(), ignore_index=ignore_index, reduction="none").view(labels.shape)
