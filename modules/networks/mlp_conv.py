"""Networks between pictures and codes, fully connected or convolutional."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from datamodules.errors import Refused

Network = Literal["fully-connected", "convolutional"]
Activation = Literal["tanh", "relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def encoder(
    network: Network, shape: tuple[int, int, int], hidden: Sequence[int], outputs: int, activation: Activation
) -> nn.Sequential:
    """Pictures (N, C, H, W) to (N, outputs).

    Args:
        network: what it consists of.
        shape: (C, H, W) of a picture.
        hidden: units of the hidden layers; of a convolutional network, channels of layers that halve sides.
        outputs: of the last layer, which is affine.
        activation: behind the hidden layers.

    Raises:
        Refused: a convolutional network has no layers, or sides cannot be halved so often.
    """
    if network == "fully-connected":
        channels, height, width = shape
        return nn.Sequential(nn.Flatten(), perceptron((channels * height * width, *hidden, outputs), activation))
    pixels = area(shape, hidden)
    layers: list[nn.Module] = []
    for into, out in pairwise((shape[0], *hidden)):
        layers += [nn.Conv2d(into, out, 4, stride=2, padding=1), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden[-1] * pixels, outputs))


def decoder(
    network: Network, inputs: int, hidden: Sequence[int], shape: tuple[int, int, int], activation: Activation
) -> nn.Sequential:
    """The way back, mirrored: (N, inputs) to (N, C, H, W), affine at the end.

    Args:
        network, hidden, activation: as of `encoder`, in its order.
        inputs: numbers of a code.
        shape: (C, H, W) of what is made.
    """
    channels, height, width = shape
    if network == "fully-connected":
        sizes = (inputs, *reversed(hidden), channels * height * width)
        return nn.Sequential(perceptron(sizes, activation), nn.Unflatten(1, shape))
    pixels = area(shape, hidden)
    smallest = (hidden[-1], height >> len(hidden), width >> len(hidden))
    layers: list[nn.Module] = [nn.Linear(inputs, hidden[-1] * pixels), nn.Unflatten(1, smallest)]
    for into, out in pairwise((*reversed(hidden), channels)):
        layers += [ACTIVATIONS[activation](), nn.ConvTranspose2d(into, out, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


def perceptron(sizes: Sequence[int], activation: Activation) -> nn.Sequential:
    """Affine layers, an activation between each two."""
    layers: list[nn.Module] = []
    for into, out in pairwise(sizes):
        layers += [nn.Linear(into, out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def area(shape: tuple[int, int, int], hidden: Sequence[int]) -> int:
    """Pixels of the smallest maps of a convolutional network."""
    if not hidden:
        raise Refused("model.hidden: a convolutional network needs layers, as in [32, 64]")
    if any(side % 2 ** len(hidden) for side in shape[1:]):
        raise Refused(
            f"model.hidden: {len(hidden)} layers halve sides of {shape[1]}x{shape[2]} pixels, which are no multiples of "
            f"{2 ** len(hidden)}"
        )
    return (shape[1] >> len(hidden)) * (shape[2] >> len(hidden))


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of pictures, which are square if there is one number."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
