"""Weight initialisation, in place."""

from torch import nn


def dcgan_init_(network: nn.Module, std: float = 0.02) -> None:
    """DCGAN (arXiv:1511.06434), Section 4: weights N(0, std); batch normalisation gains N(1, std), biases zero."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, 0, std)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, std)
            nn.init.zeros_(layer.bias)


def xavier_init_(network: nn.Module) -> None:
    """Glorot and Bengio, 2010: uniform weights, zero biases."""
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter)


def he_init_(network: nn.Module) -> None:
    """U-Net (arXiv:1505.04597), Section 3: weights N(0, sqrt(2 / N)), zero biases.

    N is the fan-in; in a stride-2 transposed convolution each output depends on one pixel per input channel.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            fan_in = layer.in_channels if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
            nn.init.normal_(layer.weight, 0, (2 / fan_in) ** 0.5)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
