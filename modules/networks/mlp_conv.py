"""Networks between pictures and codes, fully connected or convolutional."""

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
    """Pictures (N, C, H, W) to (N, outputs).

    Args:
        network: what it consists of.
        shape: (C, H, W) of a picture.
        hidden_dims: units of the hidden layers; of a convolutional network, channels of layers that halve sides.
        out_dim: of the last layer, which is affine.
        activation: behind the hidden layers.

    Raises:
        Refused: a convolutional network has no layers, or sides cannot be halved so often.
    """
    if network == "fully-connected":
        channels, height, width = shape
        return nn.Sequential(nn.Flatten(), mlp((channels * height * width, *hidden_dims, out_dim), activation))
    pixels = bottleneck_area(shape, hidden_dims)
    layers: list[nn.Module] = []
    for in_channels, out_channels in pairwise((shape[0], *hidden_dims)):
        layers += [nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden_dims[-1] * pixels, out_dim))


def decoder(
    network: NetworkType, in_dim: int, hidden_dims: Sequence[int], shape: tuple[int, int, int], activation: Activation
) -> nn.Sequential:
    """The way back, mirrored: (N, inputs) to (N, C, H, W), affine at the end.

    Args:
        network, hidden_dims, activation: as of `encoder`, in its order.
        in_dim: numbers of a code.
        shape: (C, H, W) of what is made.
    """
    channels, height, width = shape
    if network == "fully-connected":
        sizes = (in_dim, *reversed(hidden_dims), channels * height * width)
        return nn.Sequential(mlp(sizes, activation), nn.Unflatten(1, shape))
    pixels = bottleneck_area(shape, hidden_dims)
    smallest = (hidden_dims[-1], height >> len(hidden_dims), width >> len(hidden_dims))
    layers: list[nn.Module] = [nn.Linear(in_dim, hidden_dims[-1] * pixels), nn.Unflatten(1, smallest)]
    for in_channels, out_channels in pairwise((*reversed(hidden_dims), channels)):
        layers += [ACTIVATIONS[activation](), nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


def mlp(sizes: Sequence[int], activation: Activation) -> nn.Sequential:
    """Affine layers, an activation between each two."""
    layers: list[nn.Module] = []
    for in_channels, out_channels in pairwise(sizes):
        layers += [nn.Linear(in_channels, out_channels), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def bottleneck_area(shape: tuple[int, int, int], hidden_dims: Sequence[int]) -> int:
    """Pixels of the smallest maps of a convolutional network."""
    if not hidden_dims:
        raise UserError("model.hidden_dims: a convolutional network needs layers, as in [32, 64]")
    if any(side % 2 ** len(hidden_dims) for side in shape[1:]):
        raise UserError(
            f"model.hidden_dims: {len(hidden_dims)} layers halve sides of {shape[1]}x{shape[2]} pixels, which are no multiples of "
            f"{2 ** len(hidden_dims)}"
        )
    return (shape[1] >> len(hidden_dims)) * (shape[2] >> len(hidden_dims))


def to_hw(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of pictures, which are square if there is one number."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
