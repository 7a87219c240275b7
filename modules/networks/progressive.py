"""Generator and discriminator of progressive growing.

T. Karras, T. Aila, S. Laine, J. Lehtinen. Progressive Growing of GANs for Improved Quality, Stability, and Variation.
ICLR 2018. arXiv:1710.10196, Sections 2, 3 and 4, Table 2.

Both networks receive the current `level`: 0 for 4 x 4 pixels, 1 for 8 x 8, and so on. At a fraction, such as 1.3, the networks
have the size of the next level, and the new layers are blended with the old output with a weight of 0.3 (Figure 2).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import UserError
from modules.losses.precision import to_float32

FIRST_SIDE = 4  # side of the images at level 0, in pixels
LEAK = 0.2  # slope of LeakyReLU for negative inputs
KERNELS = 100  # of the minibatch discrimination
Normalization = Literal["pixel", "batch", "none"]


@dataclass(frozen=True)
class Layers:
    """Settings that Table 1 of the paper varies.

    Args:
        equalized_lr: draw weights from N(0, 1) and scale them at run time (Section 4.1); otherwise He's initialization.
        normalize_latents: divide latents by their root mean square, so that they are on a hypersphere (Appendix A.1).
        normalization: "pixel" normalizes the features of each pixel in the generator (Section 4.2). "batch" is batch
            normalization in the generator, with ReLU and tanh, and layer normalization in the discriminator, as in WGAN-GP.
            "none" has LeakyReLU as "pixel".
        fused_scale: the discriminator's second convolution of each size also averages squares of 2 x 2 pixels, before
            LeakyReLU, as in the authors' TensorFlow code; in the paper, the average is after LeakyReLU (Table 2).
        minibatch: statistics over the batch for the discriminator: standard deviation (Section 3), "discrimination"
            (Salimans et al., 2016), or none.
        group_size: consecutive samples of which the standard deviation is computed; None for all on a device.
    """

    equalized_lr: bool = True
    normalize_latents: bool = True
    normalization: Normalization = "pixel"
    minibatch: Literal["stddev", "discrimination", "none"] = "stddev"
    group_size: int | None = None
    fused_scale: bool = False


def side_of(level: float) -> int:
    """Return the side of the images at a level, in pixels."""
    return FIRST_SIDE * 2 ** math.ceil(level)


def level_of(size: int) -> int:
    """Return the level of images of a size.

    Raises:
        UserError: the size is not a power of 2, or less than 4.
    """
    if size < FIRST_SIDE or size & (size - 1):
        raise UserError(f"model.size: {size} is not valid. Use 4, 8, 16, 32 or a higher power of 2")
    return int(math.log2(size // FIRST_SIDE))


def channels_at(level: int, base_channels: int, max_channels: int) -> int:
    """Return the feature maps at a level (Table 2): `base_channels` / side of its images, times 2, at most `max_channels`."""
    return min(2 * base_channels // side_of(level), max_channels)


# Section 4.1: equalized learning rate


class ScaledWeight(nn.Module):
    """Weight and bias of a layer.

    With an equalized learning rate, the weight is drawn from N(0, 1) and multiplied by gain / sqrt(fan-in) in each forward
    pass, so that Adam updates all weights at the same relative speed. Otherwise, this factor is part of the initial weights.

    Args:
        shape: shape of the weight, output channels first.
        gain: factor of He's initialization, sqrt(2) before a ReLU.
        equalized_lr: see `Layers`.
        bias_shape: shape of the bias.
    """

    def __init__(self, shape: tuple[int, ...], gain: float, equalized_lr: bool, bias_shape: tuple[int, ...]) -> None:
        super().__init__()
        scale = gain / math.sqrt(math.prod(shape[1:]))
        self.scale = scale if equalized_lr else 1.0
        self.weight = nn.Parameter(torch.randn(shape) * (1.0 if equalized_lr else scale))
        self.bias = nn.Parameter(torch.zeros(bias_shape))


class Conv(ScaledWeight):
    """Convolution that keeps the size, with a kernel of 1 or 3: (N, in_channels, H, W) to (N, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, equalized_lr: bool, gain: float = 2**0.5) -> None:
        super().__init__((out_channels, in_channels, kernel, kernel), gain, equalized_lr, (out_channels,))

    def forward(self, maps: Tensor) -> Tensor:
        """Convolve (N, in_channels, H, W)."""
        return F.conv2d(maps, self.weight * self.scale, self.bias, padding=self.weight.shape[-1] // 2)


class UpConv(Conv):
    """Nearest-neighbor upsampling by 2 and a 3 x 3 convolution, as one transposed 4 x 4 convolution."""

    def forward(self, maps: Tensor) -> Tensor:
        """Upsample (N, in_channels, H, W) to (N, out_channels, 2 H, 2 W)."""
        kernel = shifted_sum(self.weight * self.scale).transpose(0, 1)
        return F.conv_transpose2d(maps, kernel.flip(2, 3), self.bias, stride=2, padding=1)


class DownConv(Conv):
    """3 x 3 convolution and 2 x 2 average pooling, as one 4 x 4 convolution with stride 2."""

    def forward(self, maps: Tensor) -> Tensor:
        """Downsample (N, in_channels, 2 H, 2 W) to (N, out_channels, H, W)."""
        return F.conv2d(maps, shifted_sum(self.weight * (self.scale / 4)), self.bias, stride=2, padding=1)


def shifted_sum(kernel: Tensor) -> Tensor:
    """Add a 3 x 3 kernel to its copies shifted by one row, one column and both: (O, I, 3, 3) to (O, I, 4, 4)."""
    padded = F.pad(kernel, (1, 1, 1, 1))
    return padded[..., 1:, 1:] + padded[..., :-1, 1:] + padded[..., 1:, :-1] + padded[..., :-1, :-1]


class Dense(ScaledWeight):
    """Fully connected layer."""

    def __init__(self, in_features: int, out_features: int, equalized_lr: bool, gain: float = 2**0.5) -> None:
        super().__init__((out_features, in_features), gain, equalized_lr, (out_features,))

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, in_features) to (N, out_features)."""
        return F.linear(features, self.weight * self.scale, self.bias)


class Projection(ScaledWeight):
    """Latents to the first feature maps, with one bias per channel: (N, latent_size) to (N, channels, 4, 4)."""

    def __init__(self, latent_size: int, channels: int, equalized_lr: bool) -> None:
        gain = 2**0.5 / FIRST_SIDE  # of the authors' code
        super().__init__((channels * FIRST_SIDE**2, latent_size), gain, equalized_lr, (channels, 1, 1))

    def forward(self, latents: Tensor) -> Tensor:
        """Map (N, latent_size) to (N, channels, 4, 4)."""
        return F.linear(latents, self.weight * self.scale).unflatten(1, (-1, FIRST_SIDE, FIRST_SIDE)) + self.bias


# Section 4.2: normalization


class PixelNorm(nn.Module):
    """Divide the feature vector of each pixel by its root mean square."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalize (N, C, ...) over C."""
        return maps * torch.rsqrt(to_float32(maps).square().mean(1, keepdim=True) + 1e-8).to(maps.dtype)


class LayerNorm(nn.Module):
    """Layer normalization over the channels and pixels of an image, with one scale, and an offset per channel (WGAN-GP)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """Normalize (N, channels, ...) over all but the first dimension."""
        bias = self.bias.view(-1, *[1] * (maps.ndim - 2))
        return F.layer_norm(maps, maps.shape[1:], eps=1e-4) * self.weight + bias


# Section 3: statistics over the batch


class MinibatchStddev(nn.Module):
    """Append the mean standard deviation over a group of samples as a constant feature map (Section 3)."""

    def __init__(self, group_size: int | None) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, maps: Tensor) -> Tensor:
        """Append a map to (N, C, H, W): (N, C + 1, H, W)."""
        size = min(self.group_size or len(maps), len(maps))
        groups = to_float32(maps).unflatten(0, (-1, size))  # (N / size, size, C, H, W)
        stddev = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
        feature = stddev.repeat_interleave(size).view(-1, 1, 1, 1).expand(-1, 1, *maps.shape[2:])
        return torch.cat([maps, feature.to(maps.dtype)], 1)


class MinibatchDiscrimination(nn.Module):
    """Append the similarity to the other samples in each of `kernels` projections (Salimans et al., arXiv:1606.03498, 3.2).

    The rows of the projections have a learned norm, as in the authors' code.

    Args:
        features: size of the input.
        kernels: projections, and appended features.
        kernel_size: dimension of a projection.
    """

    def __init__(self, features: int, kernels: int, kernel_size: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(kernels, kernel_size, features))
        self.log_scale = nn.Parameter(torch.zeros(kernels, kernel_size, 1))
        self.bias = nn.Parameter(torch.full((kernels,), -1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Append to (N, features): (N, features + kernels)."""
        weight = self.weight * (self.log_scale.exp() / self.weight.norm(dim=2, keepdim=True))
        projections = to_float32(torch.einsum("nf,kdf->nkd", features, weight))
        distances = (projections[:, None] - projections[None]).abs().sum(3)  # (N, N, kernels)
        similarity = (-distances).exp().sum(1) - 1 + self.bias  # without the sample itself
        return torch.cat([features, similarity.to(features.dtype)], 1)


# Table 2: the networks


class Generator(nn.Module):
    """Generator of Table 2: latents (N, latent_size) to images (N, channels, side, side) in about [-1, 1].

    Args:
        size: side of the images at the last level.
        channels: image channels.
        latent_size: dimension of the latents.
        base_channels, max_channels: see `channels_at`.
        layers: normalization and initialization.
    """

    def __init__(
        self, size: int, channels: int, latent_size: int, base_channels: int, max_channels: int, layers: Layers
    ) -> None:
        super().__init__()
        equalized, levels = layers.equalized_lr, level_of(size) + 1
        widths = [channels_at(level, base_channels, max_channels) for level in range(levels)]
        self.normalize_latents = PixelNorm() if layers.normalize_latents else nn.Identity()
        first = [Projection(latent_size, widths[0], equalized), *after_conv(widths[0], layers)]
        first += [Conv(widths[0], widths[0], 3, equalized), *after_conv(widths[0], layers)]
        self.blocks = nn.ModuleList([nn.Sequential(*first)])
        for in_width, width in pairwise(widths):
            double = [UpConv(in_width, width, 3, equalized), *after_conv(width, layers)]
            self.blocks.append(nn.Sequential(*double, Conv(width, width, 3, equalized), *after_conv(width, layers)))
        self.to_rgb = nn.ModuleList(Conv(width, channels, 1, equalized, gain=1.0) for width in widths)
        self.output = nn.Tanh() if layers.normalization == "batch" else nn.Identity()

    def forward(self, latents: Tensor, level: float) -> Tensor:
        """Generate images at a level: (N, latent_size) to (N, channels, side, side), where side is `side_of(level)`."""
        maps = self.normalize_latents(latents)
        last, weight_new = math.ceil(level), level % 1
        for block in self.blocks[: last + bool(not weight_new)]:
            maps = block(maps)
        if not weight_new:
            return self.output(self.to_rgb[last](maps))
        old, new = self.to_rgb[last - 1](maps), self.to_rgb[last](self.blocks[last](maps))
        return self.output(torch.lerp(upsample(old), new, weight_new))


def after_conv(width: int, layers: Layers) -> list[nn.Module]:
    """Return the layers after a convolution of the generator."""
    if layers.normalization == "batch":
        return [nn.BatchNorm2d(width), nn.ReLU()]
    return [nn.LeakyReLU(LEAK), *([PixelNorm()] if layers.normalization == "pixel" else [])]


class Discriminator(nn.Module):
    """Discriminator of Table 2: images (N, channels, side, side) in [-1, 1] to scores (N, 1).

    Args:
        size, channels, base_channels, max_channels, layers: see `Generator`.
    """

    def __init__(self, size: int, channels: int, base_channels: int, max_channels: int, layers: Layers) -> None:
        super().__init__()
        equalized, levels = layers.equalized_lr, level_of(size) + 1
        widths = [channels_at(level, base_channels, max_channels) for level in range(levels)]

        def activate(width: int) -> list[nn.Module]:
            return [*([LayerNorm(width)] if layers.normalization == "batch" else []), nn.LeakyReLU(LEAK)]

        self.from_rgb = nn.ModuleList(
            nn.Sequential(Conv(channels, width, 1, equalized), nn.LeakyReLU(LEAK)) for width in widths
        )
        stddev, discrimination = layers.minibatch == "stddev", layers.minibatch == "discrimination"
        hidden = min(2 * widths[0], max_channels)  # 512 in Table 2
        final: list[nn.Module] = [MinibatchStddev(layers.group_size)] if stddev else []
        final += [Conv(widths[0] + stddev, widths[0], 3, equalized), *activate(widths[0]), nn.Flatten()]
        final += [Dense(widths[0] * FIRST_SIDE**2, hidden, equalized), *activate(hidden)]
        final += [MinibatchDiscrimination(hidden, KERNELS)] if discrimination else []
        final += [Dense(hidden + KERNELS * discrimination, 1, equalized, gain=1.0)]
        self.blocks = nn.ModuleList([nn.Sequential(*final)])
        for out_width, width in pairwise(widths):
            block = [Conv(width, width, 3, equalized), *activate(width)]
            if layers.fused_scale:
                block += [DownConv(width, out_width, 3, equalized), *activate(out_width)]
            else:
                block += [Conv(width, out_width, 3, equalized), *activate(out_width), nn.AvgPool2d(2)]
            self.blocks.append(nn.Sequential(*block))

    def forward(self, image: Tensor, level: float) -> Tensor:
        """Score images (N, channels, side, side) of a level, where side is `side_of(level)`: (N, 1)."""
        last, weight_new = math.ceil(level), level % 1
        maps = self.from_rgb[last](image)
        if weight_new:
            old = self.from_rgb[last - 1](F.avg_pool2d(image, 2))
            maps = torch.lerp(old, self.blocks[last](maps), weight_new)
            last -= 1
        for block in reversed(self.blocks[: last + 1]):
            maps = block(maps)
        return maps


def upsample(image: Tensor) -> Tensor:
    """Repeat each pixel of (N, C, H, W) in both directions: (N, C, 2 H, 2 W)."""
    return F.interpolate(image, scale_factor=2)
