"""Statistics of batch normalization."""

from torch import nn


def reset_bn_stats(network: nn.Module) -> None:
    """Reset the running statistics of batch normalization; passes in training mode set them to the mean over their batches."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over the batches
