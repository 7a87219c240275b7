"""Image transformation network of fast style transfer.

J. Johnson, A. Alahi, L. Fei-Fei. ECCV 2016. arXiv:1603.08155; the architecture is in the supplementary material.
D. Ulyanov, A. Vedaldi, V. Lempitsky. Instance Normalization. 2016. arXiv:1607.08022.
V. Dumoulin, J. Shlens, M. Kudlur. A Learned Representation for Artistic Style. ICLR 2017. arXiv:1610.07629: one network for
many styles, by conditional instance normalization.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.losses.precision import to_float32
from modules.networks.crop import center_crop

Norm = Literal["batch", "instance"]
Upsampling = Literal["transposed", "nearest"]
PADDING = 40  # pixels of reflection at the start; the unpadded residual blocks remove it
IMAGE_MEAN = (0.485, 0.458, 0.408)  # of Caffe's VGG
SCALE = 0.225  # about one standard deviation of a pixel


class StyleNorm(nn.Module):
    """Batch or instance normalization with one scale and shift per style.

    Args:
        kind: normalization.
        channels: number of channels.
        n_styles: number of styles; each sample has its own mixture of them.
    """

    def __init__(self, kind: Norm, channels: int, n_styles: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.InstanceNorm2d(channels) if kind == "instance" else nn.BatchNorm2d(channels, affine=False)
        self.weight, self.bias = nn.Parameter(torch.ones(n_styles, channels)), nn.Parameter(torch.zeros(n_styles, channels))
        self.statistics: tuple[Tensor, Tensor] | None = None  # mean and variance of a whole image, while it is in tiles

    def forward(self, maps: Tensor, mixture: Tensor) -> Tensor:
        """Normalize (N, C, H, W) and apply the scales and shifts, weighted by `mixture` (N, n_styles)."""
        scale, shift = (mixture.to(maps.dtype) @ values.to(maps.dtype) for values in (self.weight, self.bias))
        if self.statistics is None:
            normalized = self.norm(maps)
        else:
            mean, variance = self.statistics
            normalized = ((maps - mean) * (variance + 1e-5).rsqrt()).to(maps.dtype)
        return normalized * scale[:, :, None, None] + shift[:, :, None, None]


class ConvNorm(nn.Module):
    """A convolution, normalization, and ReLU if `relu`."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, norm: Norm, n_styles: int, relu: bool = True) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = conv, StyleNorm(norm, conv.out_channels, n_styles), relu

    def convolve(self, maps: Tensor) -> Tensor:
        """Apply the convolution to (N, C, H, W)."""
        return self.conv(maps)

    def forward(self, maps: Tensor, mixture: Tensor) -> Tensor:
        """Apply the layers to (N, C, H, W)."""
        maps = self.norm(self.convolve(maps), mixture)
        return F.relu(maps) if self.relu else maps


class Upsample(ConvNorm):
    """A layer that doubles the resolution: a transposed convolution, or nearest-neighbor upsampling and a convolution."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, n_styles: int, upsampling: Upsampling) -> None:
        if upsampling == "nearest":
            conv: nn.Conv2d | nn.ConvTranspose2d = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        else:
            conv = nn.ConvTranspose2d(in_channels, out_channels, 3, 2, padding=1, output_padding=1)
        super().__init__(conv, norm, n_styles)
        self.nearest = upsampling == "nearest"

    def convolve(self, maps: Tensor) -> Tensor:
        """Upsample (N, C, h, w) to (N, C', 2 h, 2 w)."""
        return self.conv(F.interpolate(maps, scale_factor=2, mode="nearest") if self.nearest else maps)


class Residual(nn.Module):
    """Two unpadded 3 x 3 convolutions; the shortcut is cropped by two pixels on each side. No ReLU after the sum."""

    def __init__(self, channels: int, norm: Norm, n_styles: int) -> None:
        super().__init__()
        self.first = ConvNorm(nn.Conv2d(channels, channels, 3), norm, n_styles)
        self.second = ConvNorm(nn.Conv2d(channels, channels, 3), norm, n_styles, relu=False)

    def forward(self, maps: Tensor, mixture: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, h - 4, w - 4)."""
        residual = self.second(self.first(maps, mixture), mixture)
        return residual + center_crop(maps, residual.shape[-2:])


class TransformNet(nn.Module):
    """Two downsampling convolutions, five residual blocks, two upsampling layers.

    Args:
        base_channels: feature maps at full resolution; 32 in the paper, 16 in the released models with instance normalization.
        norm: "batch" (paper) or "instance" (the code's default).
        upsampling: "transposed" (paper) or "nearest" (pytorch/examples).
        n_styles: number of styles.
    """

    def __init__(self, base_channels: int, norm: Norm, upsampling: Upsampling, n_styles: int = 1) -> None:
        super().__init__()
        c = base_channels
        self.down = nn.ModuleList(
            [
                ConvNorm(nn.Conv2d(3, c, 9, padding=4), norm, n_styles),
                ConvNorm(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), norm, n_styles),
                ConvNorm(nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1), norm, n_styles),
            ]
        )
        self.residuals = nn.ModuleList(Residual(4 * c, norm, n_styles) for _ in range(5))
        self.up = nn.ModuleList(
            [Upsample(4 * c, 2 * c, norm, n_styles, upsampling), Upsample(2 * c, c, norm, n_styles, upsampling)]
        )
        self.head = nn.Conv2d(c, 3, 9, padding=4)

    def forward(self, image: Tensor, mixture: Tensor) -> Tensor:
        """Transform images (N, 3, H, W) in [0, 1] to the same shape; sides are multiples of 4 and at least 44 pixels.

        The output may exceed [0, 1], see `from_network_range`.

        Args:
            image: input images.
            mixture: weights of the styles of each sample, (N, n_styles).
        """
        maps = to_network_range(F.pad(image, (PADDING,) * 4, mode="reflect"))
        for layer in (*self.down, *self.residuals, *self.up):
            maps = layer(maps, mixture)
        return from_network_range(self.head(maps))


def to_network_range(image: Tensor) -> Tensor:
    """Normalize images (N, 3, H, W) in [0, 1] for an image transformation network."""
    return (image - image.new_tensor(IMAGE_MEAN).view(1, 3, 1, 1)) / SCALE


def from_network_range(output: Tensor) -> Tensor:
    """Convert the output of the last convolution to images, which may exceed [0, 1].

    As in the released code, the image is 150 tanh + the mean of ImageNet in 0 ... 255, here in units of 1.
    """
    output = to_float32(output)  # bf16 has fewer levels than an 8-bit image
    return 150 / 255 * output.tanh() + output.new_tensor(IMAGE_MEAN).view(1, 3, 1, 1)
