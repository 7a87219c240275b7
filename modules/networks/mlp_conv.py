"""Fully connected or convolutional encoders and decoders."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from datamodules.errors import UserError

NetworkType = Literal["fully-connected", "convolutional"]
Activation = Literal["tanh", "relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def encoder(
    network: NetworkType, shape: tuple[int, int, int], hidden_dims: Sequence[int], out_dim: int, activation: Activation
) -> nn.Sequential:
    """Create a network from images (N, C, H, W) to (N, out_dim).

    Args:
        network: type of the network.
        shape: image shape (C, H, W).
        hidden_dims: units of the hidden layers, or channels of stride-2 convolutions.
        out_dim: size of the affine output layer.
        activation: activation after each hidden layer.

    Raises:
        UserError: a convolutional network has no layers, or an image side is not a multiple of 2**len(hidden_dims).
    """
    if network == "fully-connected":
        channels, height, width = shape
        return nn.Sequential(nn.Flatten(), mlp((channels * height * width, *hidden_dims, out_dim), activation))
    area = bottleneck_area(shape, hidden_dims)
    layers: list[nn.Module] = []
    for in_channels, out_channels in pairwise((shape[0], *hidden_dims)):
        layers += [nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden_dims[-1] * area, out_dim))


def decoder(
    network: NetworkType, in_dim: int, hidden_dims: Sequence[int], shape: tuple[int, int, int], activation: Activation
) -> nn.Sequential:
    """Create a network from (N, in_dim) to images (N, C, H, W): a mirrored `encoder` with an affine output layer.

    Args:
        network, hidden_dims, activation: see `encoder`; `hidden_dims` in the order of the encoder.
        in_dim: size of the input.
        shape: image shape (C, H, W).

    Raises:
        UserError: see `encoder`.
    """
    channels, height, width = shape
    if network == "fully-connected":
        sizes = (in_dim, *reversed(hidden_dims), channels * height * width)
        return nn.Sequential(mlp(sizes, activation), nn.Unflatten(1, shape))
    area = bottleneck_area(shape, hidden_dims)
    bottleneck_shape = (hidden_dims[-1], height >> len(hidden_dims), width >> len(hidden_dims))
    layers: list[nn.Module] = [nn.Linear(in_dim, hidden_dims[-1] * area), nn.Unflatten(1, bottleneck_shape)]
    for in_channels, out_channels in pairwise((*reversed(hidden_dims), channels)):
        layers += [ACTIVATIONS[activation](), nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


def mlp(sizes: Sequence[int], activation: Activation) -> nn.Sequential:
    """Create affine layers with activations between them: (N, sizes[0]) to (N, sizes[-1])."""
    layers: list[nn.Module] = []
    for in_channels, out_channels in pairwise(sizes):
        layers += [nn.Linear(in_channels, out_channels), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def bottleneck_area(shape: tuple[int, int, int], hidden_dims: Sequence[int]) -> int:
    """Return the number of pixels of the smallest feature maps of a convolutional network.

    Raises:
        UserError: see `encoder`.
    """
    if not hidden_dims:
        raise UserError("model.hidden_dims: a convolutional network needs at least one layer. Use [32, 64], for example")
    if any(side % 2 ** len(hidden_dims) for side in shape[1:]):
        raise UserError(
            f"model.hidden_dims: {len(hidden_dims)} layers need image sides that are multiples of {2 ** len(hidden_dims)}, "
            f"not {shape[1]}x{shape[2]} pixels. Use fewer layers or another image size"
        )
    return (shape[1] >> len(hidden_dims)) * (shape[2] >> len(hidden_dims))


def to_hw(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width from a pair, or from a single number for square images."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
