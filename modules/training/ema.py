"""Averaged weights."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """A network's exponential average over the images seen; `Method` updates it after each training step.

    It is a part of the method, so checkpoints carry it beside the network itself.

    Args:
        network: what to average; its buffers are taken as they are.
        half_life: images after which a weight's share has halved (ProGAN, Appendix A, has a factor of 0.999 a step).
    """

    network: nn.Module
    online: nn.Module

    def __init__(self, network: nn.Module, half_life: int) -> None:
        super().__init__()
        self.network = deepcopy(network).requires_grad_(False)
        object.__setattr__(self, "online", network)  # not as a part: the method has it already
        self.half_life = half_life

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the averaged network gives."""
        return self.network(*inputs)

    @torch.no_grad()
    def update(self, images: int) -> None:
        """Take in the weights after a step of that many images."""
        weight = 1 - 0.5 ** (images / self.half_life)
        torch._foreach_lerp_(list(self.network.parameters()), list(self.online.parameters()), weight)
        for ema_buffer, online_buffer in zip(self.network.buffers(), self.online.buffers(), strict=True):
            ema_buffer.copy_(online_buffer)
