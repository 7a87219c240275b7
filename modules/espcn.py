"""ESPCN: super-resolution by sub-pixel convolution.

W. Shi, J. Caballero, F. Huszar, J. Totz, A. Aitken, R. Bishop, D. Rueckert, Z. Wang. Real-Time Single Image and Video
Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network. CVPR 2016. arXiv:1609.05158.

Differences from the paper, with reasons:

1. Degradation. In Section 3.1, images are blurred with a Gaussian filter of unspecified width. The paper's own bicubic results
   match MATLAB's antialiased bicubic `imresize`, so training uses this function.
2. Optimizer. The paper does not specify the optimizer. The paper's learning rate decreases from 0.01 to 0.0001 as the cost
   levels off, and is ten times smaller in the last layer (Section 3.2). Neighboring pixels are nearly equal. The problem is
   therefore ill-conditioned, and Adam needs hours. SOAP (Vyas et al., arXiv:2409.11321: Adam in the eigenbasis of Shampoo's
   preconditioner) needs minutes. The learning rate decreases along a half cosine and is the same for all layers.
3. Patches. A patch has 17 x 17 LR pixels, and 4 pixels of context on each side for the three convolutions (25 x 25 in total).
   The paper does not specify the padding. Patches are sampled at random positions instead of on a grid, so that every pixel
   is used as a target. They are flipped and rotated.
4. Model selection. Six of the 91 images are held out for model selection, and the number of patches is fixed. In the paper,
   training stops after 100 epochs without improvement.
5. Initialization is PyTorch's default; the paper does not specify it.
"""

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.optim import Optimizer

from modules.tasks.superresolution import SuperResolutionMethod, pad_replicate, valid_conv_margin
from modules.training.optimizers import soap

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class ESPCN(SuperResolutionMethod):
    """Section 2.2: feature maps in LR space, one sub-pixel convolution at the end.

    Args:
        scale: scale factor; r in the paper, with results for 3 and 4.
        activation: "tanh" as in the final models, or "relu" as in the ablation of Table 1.
        total_images: training budget in patches.
        learning_rate: maximum learning rate.
        warmup: patches over which the learning rate rises.
    """

    def __init__(
        self,
        scale: Literal[2, 3, 4] = 3,
        activation: Literal["tanh", "relu"] = "tanh",
        total_images: int = 1_000_000,
        learning_rate: PositiveFloat = 3e-3,
        warmup: NonNegativeInt = 3_200,
    ) -> None:
        super().__init__(scale, total_images, learning_rate, warmup)
        self.save_hyperparameters()
        # Section 3.2: (f1, n1) = (5, 64), (f2, n2) = (3, 32), f3 = 3.
        self.network = nn.Sequential(
            nn.Conv2d(1, 64, 5),
            ACTIVATIONS[activation](),
            nn.Conv2d(64, 32, 3),
            ACTIVATIONS[activation](),
            nn.Conv2d(32, scale**2, 3),
            nn.PixelShuffle(scale),  # eq. 4, up to the order of channels
        ).to(memory_format=torch.channels_last)
        self.min_patch_size = 2 * valid_conv_margin(self.network) + 1

    def forward(self, lr_image: Tensor) -> Tensor:
        """Upscale luma (N, 1, h, w) in [0, 1] to (N, 1, h * scale, w * scale), without clipping."""
        return self.forward_valid(pad_replicate(lr_image, valid_conv_margin(self.network)))

    def forward_valid(self, lr_image: Tensor) -> Tensor:
        """Apply the network without padding: (N, 1, h, w) to (N, 1, (h - 8) * scale, (w - 8) * scale)."""
        return self.network(lr_image)

    def configure_optimizers(self) -> Optimizer:
        """Create the SOAP optimizer; see difference 2 above."""
        return soap(self.network.parameters(), self.learning_rate)
