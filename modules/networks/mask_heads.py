"""Heads of Mask R-CNN (arXiv:1703.06870, Figure 4 and Section 5).

Their layers have the names of torchvision, so that its weights fit.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from modules.networks.init import msra_init_

MASK_SIZE = 14  # side of the pooled features


class MaskHead(nn.Sequential):
    """Convolutions of the mask head (Figure 4, right): (R, C, 14, 14) to (R, channels, 14, 14)."""

    def __init__(self, in_channels: int, layers: int, channels: int) -> None:
        widths = [in_channels] + layers * [channels]
        super().__init__(*(nn.Sequential(nn.Conv2d(widths[i], widths[i + 1], 3, padding=1), nn.ReLU()) for i in range(layers)))
        msra_init_(self)


class MaskPredictor(nn.Sequential):
    """Transposed convolution and logits of each class: (R, C, m, m) to (R, outputs, 2 m, 2 m)."""

    def __init__(self, in_channels: int, channels: int, outputs: int) -> None:
        layers = [
            ("conv5_mask", nn.ConvTranspose2d(in_channels, channels, 2, 2)),
            ("relu", nn.ReLU()),
            ("mask_fcn_logits", nn.Conv2d(channels, outputs, 1)),
        ]
        super().__init__(OrderedDict(layers))
        msra_init_(self)


class MaskMLP(nn.Sequential):
    """Fully connected layers instead of convolutions (Table 2e): (R, 14 * 14 C) to (R, outputs, 28, 28)."""

    def __init__(self, in_channels: int, layers: int, channels: int, outputs: int) -> None:
        widths = [in_channels * MASK_SIZE**2] + layers * [channels]
        hidden = [part for i in range(layers) for part in (nn.Linear(widths[i], widths[i + 1]), nn.ReLU())]
        side = 2 * MASK_SIZE
        super().__init__(*hidden, nn.Linear(channels, outputs * side**2), nn.Unflatten(1, (outputs, side, side)))


class KeypointHead(nn.Sequential):
    """Convolutions of the keypoint head: (R, C, 14, 14) to (R, channels, 14, 14)."""

    def __init__(self, in_channels: int, layers: int, channels: int) -> None:
        widths = [in_channels] + layers * [channels]
        super().__init__(
            *(part for i in range(layers) for part in (nn.Conv2d(widths[i], widths[i + 1], 3, padding=1), nn.ReLU()))
        )
        msra_init_(self)


class KeypointPredictor(nn.Module):
    """Transposed convolution and bilinear enlargement: (R, C, 14, 14) to (R, K, 56, 56)."""

    def __init__(self, in_channels: int, num_keypoints: int) -> None:
        super().__init__()
        self.kps_score_lowres = nn.ConvTranspose2d(in_channels, num_keypoints, 4, 2, padding=1)
        msra_init_(self)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits of the positions of each keypoint."""
        return F.interpolate(self.kps_score_lowres(features), scale_factor=2, mode="bilinear")
