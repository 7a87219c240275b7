"""SRCNN: super-resolution of a bicubically enlarged picture, the baseline of ESPCN's tables.

C. Dong, C. C. Loy, K. He, X. Tang. Image Super-Resolution Using Deep Convolutional Networks. TPAMI 2016.
arXiv:1501.00092.

What we do differently, and why:

1. Optimizer. The paper takes SGD with momentum 0.9 at 1e-4, 1e-5 in the last layer, for up to 8e8 back-propagations
   (Section 3.3), which is days. Here SOAP, as in `modules/espcn.py`, along a half cosine.
2. Patches of 51 x 51 target pixels (the paper's: 21 x 21, from 33 x 33) are drawn at random places instead of on a grid of
   stride 14, mirrored and turned; six of the 91 pictures are kept to choose the weights.
3. Initialisation is PyTorch's instead of N(0, 0.001), from which the training above would not start quickly.
"""

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.transforms.resize import imresize
from modules.tasks.superresolution import SuperResolutionMethod, pad_replicate, valid_conv_margin
from modules.training.optimizers import soap

KERNEL_SIZES = {"9-1-5": (9, 1, 5), "9-3-5": (9, 3, 5), "9-5-5": (9, 5, 5)}


class SRCNN(SuperResolutionMethod):
    """Section 3.1: patch extraction, non-linear mapping, reconstruction, in the enlarged picture.

    Args:
        scale: enlargement of the bicubic first step.
        kernels: the three kernel sizes of Section 4.3.2; "9-1-5" has 8,032 weights, "9-5-5" has 57,184.
        total_images: training budget in patches.
        learning_rate: highest value.
        warmup: patches over which it rises.
    """

    def __init__(
        self,
        scale: Literal[2, 3, 4] = 3,
        kernels: Literal["9-1-5", "9-3-5", "9-5-5"] = "9-1-5",
        total_images: int = 1_000_000,
        learning_rate: PositiveFloat = 3e-3,
        warmup: NonNegativeInt = 3_200,
    ) -> None:
        super().__init__(scale, total_images, learning_rate, warmup)
        self.save_hyperparameters()
        f1, f2, f3 = KERNEL_SIZES[kernels]
        self.network = nn.Sequential(
            nn.Conv2d(1, 64, f1),  # eq. 1
            nn.ReLU(),
            nn.Conv2d(64, 32, f2),  # eq. 2
            nn.ReLU(),
            nn.Conv2d(32, 1, f3),  # eq. 3
        ).to(memory_format=torch.channels_last)

    def forward(self, lr_image: Tensor) -> Tensor:
        """Luma (N, 1, h, w) in [0, 1] to (N, 1, h * scale, w * scale); not clipped."""
        return self.network(pad_replicate(self.bicubic_upscale(lr_image), valid_conv_margin(self.network)))

    def forward_valid(self, lr_image: Tensor) -> Tensor:
        """Without padding: (N, 1, h, w) to (N, 1, h * scale - margin, ...), 24 less at x3 with 9-1-5.

        The two LR pixels next to a patch's border are bicubic values of a replicated border; they are left out.
        """
        margin = 2 * self.scale
        return self.network(self.bicubic_upscale(lr_image)[..., margin:-margin, margin:-margin])

    def bicubic_upscale(self, lr_image: Tensor) -> Tensor:
        """The bicubic first step: (N, 1, h, w) to (N, 1, h * scale, w * scale)."""
        height, width = lr_image.shape[-2:]
        return imresize(lr_image, (height * self.scale, width * self.scale))

    def configure_optimizers(self) -> Optimizer:
        """SOAP; see difference 1 above."""
        return soap(self.network.parameters(), self.learning_rate)
