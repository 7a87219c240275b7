"""Exponential moving averages of weights."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """Exponential moving average of a network's weights; `Method` updates it after each training step.

    It is a submodule of the method, so checkpoints contain both the network and its average.

    Args:
        network: network to average; its buffers are copied without averaging.
        half_life: images after which the weight of an old value has halved (ProGAN, Appendix A: a factor of 0.999 per step).
    """

    network: nn.Module
    online: nn.Module

    def __init__(self, network: nn.Module, half_life: int) -> None:
        super().__init__()
        self.network = deepcopy(network).requires_grad_(False)
        object.__setattr__(self, "online", network)  # not a submodule: the method has registered it
        self.half_life = half_life

    def forward(self, *inputs: Tensor) -> Tensor:
        """Apply the averaged network."""
        return self.network(*inputs)

    @torch.no_grad()
    def update(self, images: int) -> None:
        """Update the average after a training step of `images` images."""
        weight = 1 - 0.5 ** (images / self.half_life)
        torch._foreach_lerp_(list(self.network.parameters()), list(self.online.parameters()), weight)
        for ema_buffer, online_buffer in zip(self.network.buffers(), self.online.buffers(), strict=True):
            ema_buffer.copy_(online_buffer)
