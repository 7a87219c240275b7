"""Weight initialization, in place."""

from torch import nn


def dcgan_init_(network: nn.Module, std: float = 0.02) -> None:
    """Initialize as in DCGAN (arXiv:1511.06434), Section 4.

    Weights are normal with mean 0 and standard deviation `std`. Batch normalization has weights with mean 1 and the same
    standard deviation, and zero biases. Other biases do not change.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, 0, std)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, std)
            nn.init.zeros_(layer.bias)


def xavier_init_(network: nn.Module) -> None:
    """Initialize as in Glorot and Bengio, 2010: uniform weights, zero biases."""
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter)


def he_init_(network: nn.Module) -> None:
    """Initialize as in U-Net (arXiv:1505.04597), Section 3: normal weights with standard deviation sqrt(2 / N), zero biases.

    N is the fan-in. In a 2 x 2 transposed convolution with stride 2, each output depends on one pixel per input channel.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            fan_in = layer.in_channels if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
            nn.init.normal_(layer.weight, 0, (2 / fan_in) ** 0.5)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)


def msra_init_(module: nn.Module) -> None:
    """Initialize convolutions as He et al. (arXiv:1502.01852) with the fan-out, and biases with zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
