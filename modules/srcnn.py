"""SRCNN: super-resolution of bicubically upscaled images, the baseline in ESPCN's tables.

C. Dong, C. C. Loy, K. He, X. Tang. Image Super-Resolution Using Deep Convolutional Networks. TPAMI 2016.
arXiv:1501.00092.

Differences from the paper, with reasons:

1. Optimizer. The paper uses SGD with momentum 0.9 at 1e-4 (1e-5 in the last layer) for up to 8e8 back-propagations
   (Section 3.3), which takes days. We use SOAP with a half-cosine schedule, as in `modules/espcn.py`.
2. Patches. Crops of 51 x 51 target pixels (the paper's: 21 x 21, from 33 x 33) are sampled at random positions, flipped and
   rotated; the paper uses a grid of stride 14. Six of the 91 images are held out for model selection.
3. Initialisation is PyTorch's instead of N(0, 0.001), from which training would start slowly.
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
    """Section 3.1: patch extraction, non-linear mapping and reconstruction on the upscaled image.

    Args:
        scale: scale factor of the bicubic upscaling.
        kernels: the three kernel sizes of Section 4.3.2; "9-1-5" has 8,032 weights, "9-5-5" has 57,184.
        total_images: training budget in patches.
        learning_rate: maximum learning rate.
        warmup: patches over which the learning rate rises.
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
        self.min_patch_size = 4 + -(-(2 * valid_conv_margin(self.network) + 1) // scale)

    def forward(self, lr_image: Tensor) -> Tensor:
        """Luma (N, 1, h, w) in [0, 1] to (N, 1, h * scale, w * scale); not clipped."""
        return self.network(pad_replicate(self.bicubic_upscale(lr_image), valid_conv_margin(self.network)))

    def forward_valid(self, lr_image: Tensor) -> Tensor:
        """Apply the network without padding: (N, 1, h, w) to (N, 1, h * scale - margin, ...); 24 less at x3 with 9-1-5.

        The two LR pixels at each border of a patch are cropped, since their bicubic values use a replicated border.
        """
        margin = 2 * self.scale
        return self.network(self.bicubic_upscale(lr_image)[..., margin:-margin, margin:-margin])

    def bicubic_upscale(self, lr_image: Tensor) -> Tensor:
        """Bicubic upscaling: (N, 1, h, w) to (N, 1, h * scale, w * scale)."""
        height, width = lr_image.shape[-2:]
        return imresize(lr_image, (height * self.scale, width * self.scale))

    def configure_optimizers(self) -> Optimizer:
        """SOAP; see difference 1 above."""
        return soap(self.network.parameters(), self.learning_rate)
