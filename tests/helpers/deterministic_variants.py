"""The methods without what comparisons of runs whose rounding or whose shares of a batch differ must leave out.

SOAP's first preconditioner has a null space whose basis rounding decides: two runs that differ by 1e-16 take different,
equally good steps. Adam's large epsilon keeps its steps smooth where a gradient is nearly zero. Dropout and the statistics
of batch normalisation are each process's own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from modules.cyclegan import CycleGAN
from modules.dcgan import DCGAN
from modules.espcn import ESPCN
from modules.gan import GAN
from modules.smp import SMPSegmenter
from modules.srcnn import SRCNN
from modules.unet import UNet


class SteadyESPCN(ESPCN):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-3)


class SteadySRCNN(SRCNN):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-3)


class SteadyGAN(GAN):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for layer in self.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0


class SteadyUNet(UNet):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.dropout.p = 0


class SteadyEncoderDecoder(SMPSegmenter):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for layer in self.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0
            for name, child in layer.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(layer, name, nn.GroupNorm(4, child.num_features))

    def forward(self, image: Tensor) -> Tensor:
        """Alone, as part of a part, an image is refused for the statistics' sake, which are not there any more."""
        return super().forward(image) if len(image) > 1 else super().forward(torch.cat([image, image]))[:1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-3)


class SteadyDCGAN(DCGAN):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for network in (self.generator, self.discriminator):
            for i, layer in enumerate(network):
                if isinstance(layer, nn.BatchNorm2d):
                    network[i] = nn.GroupNorm(4, layer.num_features)

    def adam(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, betas=(0.5, 0.999), eps=1e-3)


class SteadyCycleGAN(CycleGAN):
    def adam(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, betas=(0.5, 0.999), eps=1e-3)
