"""ESPCN: super-resolution by sub-pixel convolution.

W. Shi, J. Caballero, F. Huszar, J. Totz, A. Aitken, R. Bishop, D. Rueckert, Z. Wang. Real-Time Single Image and Video
Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network. CVPR 2016. arXiv:1609.05158.

What we do differently, and why:

1. Degradation. Section 3.1 blurs with a Gaussian whose width is not given; the paper's own bicubic rows are those of
   MATLAB's antialiased bicubic `imresize`, so training uses that too.
2. Optimizer. The paper lowers a learning rate from 0.01 to 0.0001 as the cost levels off, ten times slower in the last
   layer (Section 3.2); the optimizer is not stated. Neighbouring pixels are nearly equal, which makes the problem so badly
   conditioned that Adam needs hours. SOAP (Vyas et al., arXiv:2409.11321: Adam in the eigenbasis of Shampoo's
   preconditioner) needs minutes. The learning rate falls along a half cosine, and no layer is slower than another.
3. Patches. Their 17 x 17 LR pixels are targets here, with the 4 pixels of context around them that the three
   convolutions need (25 x 25 in all): the paper does not say whether it pads. Places are drawn at random instead of from
   a grid, so that every pixel is a target; patches are mirrored and turned.
4. Six of the 91 pictures are kept from training to choose the weights, and a fixed number of patches is seen, where the
   paper stops after 100 epochs without improvement.
5. Initialisation is PyTorch's; the paper does not give one.
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
        scale: the paper's r; the paper reports 3 and 4.
        activation: "tanh" for the final models, "relu" for the ablation of Table 1.
        total_images: training budget in patches.
        learning_rate: highest value.
        warmup: patches over which it rises.
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

    def forward(self, lr_image: Tensor) -> Tensor:
        """Luma (N, 1, h, w) in [0, 1] to (N, 1, h * scale, w * scale); not clipped."""
        return self.forward_valid(pad_replicate(lr_image, valid_conv_margin(self.network)))

    def forward_valid(self, lr_image: Tensor) -> Tensor:
        """Without padding: (N, 1, h, w) to (N, 1, (h - 8) * scale, (w - 8) * scale)."""
        return self.network(lr_image)

    def configure_optimizers(self) -> Optimizer:
        """SOAP; see difference 2 above."""
        return soap(self.network.parameters(), self.learning_rate)
