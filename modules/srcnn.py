"""SRCNN, the baseline in ESPCN's tables: super-resolution of bicubically upscaled images.

C. Dong, C. C. Loy, K. He, X. Tang. Image Super-Resolution Using Deep Convolutional Networks. TPAMI 2016.
arXiv:1501.00092.

Differences from the paper, with reasons:

1. Optimizer. The paper uses SGD with a momentum of 0.9 and a learning rate of 1e-4 (1e-5 in the last layer). Training
   requires up to 8e8 back-propagations (Section 3.3), which take days. This code uses SOAP with a half-cosine schedule, as in
   `modules/espcn.py`.
2. Patches. With scale 3 and kernels 9-1-5, a patch has 51 x 51 target pixels. In the paper, it has 21 x 21 target pixels,
   from 33 x 33 input pixels. Patches are sampled at random positions, flipped and rotated, instead of on a grid of stride 14.
   Six of the 91 images are held out for model selection.
3. Initialization is PyTorch's default. With the paper's N(0, 0.001), the loss decreases slowly at the start of training.
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
        kernels: sizes of the three kernels (Section 4.3.2); "9-1-5" has 8,032 weights and "9-5-5" has 57,184, without biases.
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
        """Upscale luma (N, 1, h, w) in [0, 1] to (N, 1, h * scale, w * scale), without clipping."""
        return self.network(pad_replicate(self.bicubic_upscale(lr_image), valid_conv_margin(self.network)))

    def forward_valid(self, lr_image: Tensor) -> Tensor:
        """Apply the network without padding: (N, 1, h, w) to (N, 1, h * scale - m, w * scale - m).

        m is 4 * scale plus the pixels lost in the convolutions: 24 for scale 3 and kernels 9-1-5. Two LR pixels at each border
        of a patch are cropped after upscaling, because their bicubic values depend on a replicated border.
        """
        margin = 2 * self.scale
        return self.network(self.bicubic_upscale(lr_image)[..., margin:-margin, margin:-margin])

    def bicubic_upscale(self, lr_image: Tensor) -> Tensor:
        """Upscale images by bicubic interpolation: (N, 1, h, w) to (N, 1, h * scale, w * scale)."""
        height, width = lr_image.shape[-2:]
        return imresize(lr_image, (height * self.scale, width * self.scale))

    def configure_optimizers(self) -> Optimizer:
        """Create the SOAP optimizer; see difference 1 above."""
        return soap(self.network.parameters(), self.learning_rate)
