"""U-Net: a contracting path, an expanding path, and skip connections between them.

O. Ronneberger, P. Fischer, T. Brox. U-Net: Convolutional Networks for Biomedical Image Segmentation. MICCAI 2015.
arXiv:1505.04597.

Differences from the paper, with reasons:

1. The loss is the mean over the pixels, not their sum, so that the learning rate does not depend on the tile size.
2. The paper gives no learning rate. Recipes set it, and it falls to zero along a half cosine.
3. The paper averages predictions over seven rotations. With `tta_views`, predictions are averaged over symmetries of the
   square, which need no interpolation.
4. Width and depth are parameters; the paper uses 64 and 4.
5. The border weight of eq. 2 applies to background pixels only, as in the authors' later code; in the paper it applies to all
   pixels. The class weights have a mean of 1 (`datamodules/transforms/weight_map.py`). Recipes can enable flips of tiles.
6. The network input is in [-1, 1]; the paper does not specify its range. Without normalization layers, training is faster with
   centered inputs.
"""

from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.errors import UserError
from modules.networks.crop import center_crop
from modules.networks.init import he_init_
from modules.tasks.segmentation import SegmentationMethod
from modules.tasks.tiling import Tiling
from modules.training.optimizers import kernels


class UNet(SegmentationMethod):
    """Section 2: convolutions without padding, so that every output pixel has its full context.

    Args:
        channels: image channels, 1 or 3.
        num_classes: number of classes.
        base_channels: channels at full resolution; they double at every downsampling.
        depth: number of downsampling steps.
        dropout: dropout probability at the end of the contracting path.
        tile_size: side of an output tile in pixels; in the paper 388, from an input of 572.
        tta_views: see `SegmentationMethod`.
        total_images: training budget, in tiles.
        learning_rate: initial learning rate.
        seed: seed of dropout in training.

    Raises:
        UserError: `tile_size` or `tta_views` is not valid.
    """

    def __init__(
        self,
        channels: int = 1,
        num_classes: int = 2,
        base_channels: PositiveInt = 64,
        depth: PositiveInt = 4,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.5,
        tile_size: int = 388,
        tta_views: int = 1,
        total_images: int = 30_000,
        learning_rate: PositiveFloat = 1e-3,
        seed: int = 0,
    ) -> None:
        tiling = Tiling(tile_size, margin=12 * 2**depth - 8, stride=2**depth, offset=4)
        super().__init__(num_classes, tiling, tta_views, total_images, learning_rate, seed)
        self.save_hyperparameters()
        level_channels = [base_channels * 2**level for level in range(depth + 1)]
        self.enc = nn.ModuleList(double_conv(*pair) for pair in pairwise([channels, *level_channels]))
        up_channels = list(pairwise(level_channels[::-1]))
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(c_in, c_out, 2, 2) for c_in, c_out in up_channels)
        self.dec = nn.ModuleList(double_conv(*pair) for pair in up_channels)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(base_channels, num_classes, 1)
        he_init_(self)
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits (Figure 1). Comments give the sides of the paper's feature maps, for a depth of 4.

        Args:
            image: (N, channels, H, W) in [0, 1]; `tiling` defines the valid sides.

        Returns:
            Logits (N, num_classes, H - margin, W - margin).

        Raises:
            UserError: a side is too small, or would be odd before a pooling.
        """
        if any((side - self.tiling.margin - 4) % self.tiling.stride or side <= self.tiling.margin for side in image.shape[-2:]):
            valid_side = self.tiling.round_up(max(image.shape[-2:]) - self.tiling.margin) + self.tiling.margin
            raise UserError(f"U-Net: {image.shape[-1]}x{image.shape[-2]} pixels is not a valid input size. Use {valid_side}")
        x, skips = image * 2 - 1, []  # (572)
        for level, convolve in enumerate(self.enc):
            x = convolve(F.max_pool2d(x, 2) if level else x)  # (568, 280, 136, 64, 28)
            if level >= len(self.enc) - 2:
                x = self.dropout(x)
            skips.append(x)
        x = skips.pop()
        for upsample, dec in zip(self.upsample, self.dec, strict=True):
            x = upsample(x)  # (56, 104, 200, 392)
            x = dec(torch.cat([center_crop(skips.pop(), x.shape[-2:]), x], dim=1))  # (52, 100, 196, 388)
        return self.head(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create SGD with a momentum of 0.99, as in Section 3, where a batch is one tile."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.99, **kernels(self.device))


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Create two 3 x 3 convolutions with ReLU: (N, in_channels, H, W) to (N, out_channels, H - 4, W - 4)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3), nn.ReLU(), nn.Conv2d(out_channels, out_channels, 3), nn.ReLU()
    )
