"""Variants of the methods for comparisons of runs with different rounding or a different number of ranks.

Rounding determines the null space basis of SOAP's first preconditioner: two runs that differ by 1e-16 take different steps.
Adam with a large epsilon is smooth for gradients near zero. Dropout and the statistics of batch normalization differ between
ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from modules.colorization import ColorfulColorization
from modules.cyclegan import CycleGAN
from modules.dcgan import DCGAN
from modules.espcn import ESPCN
from modules.gan import GAN
from modules.networks.progressive import MinibatchStddev
from modules.perceptual_sr import PerceptualSR
from modules.progan import ProGAN
from modules.smp import SMPSegmenter
from modules.srcnn import SRCNN
from modules.style_transfer import StyleTransfer
from modules.unet import UNet


class DeterministicESPCN(ESPCN):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-3)


class DeterministicSRCNN(SRCNN):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-3)


class DeterministicGAN(GAN):
    def __init__(self, **init_args: Any) -> None:
        super().__init__(**init_args)
        for layer in self.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0


class DeterministicUNet(UNet):
    def __init__(self, **init_args: Any) -> None:
        super().__init__(**init_args)
        self.dropout.p = 0


class DeterministicSMPSegmenter(SMPSegmenter):
    def __init__(self, **init_args: Any) -> None:
        super().__init__(**init_args)
        for layer in self.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0
            for name, child in layer.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(layer, name, nn.GroupNorm(4, child.num_features))

    def forward(self, image: Tensor) -> Tensor:
        """Duplicate a single image. The base class rejects single images because of the batch statistics."""
        return super().forward(image) if len(image) > 1 else super().forward(torch.cat([image, image]))[:1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-3)


class DeterministicDCGAN(DCGAN):
    def __init__(self, **init_args: Any) -> None:
        super().__init__(**init_args)
        for network in (self.generator, self.discriminator):
            for i, layer in enumerate(network):
                if isinstance(layer, nn.BatchNorm2d):
                    network[i] = nn.GroupNorm(4, layer.num_features)

    def adam(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), betas=(0.5, 0.999), eps=1e-3)


class DeterministicColorization(ColorfulColorization):
    def __init__(self, **init_args: Any) -> None:
        super().__init__(**init_args)
        for block in self.network:
            if isinstance(block, nn.Sequential) and isinstance(block[-1], nn.BatchNorm2d):
                block[-1] = nn.GroupNorm(4, block[-1].num_features)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=self.learning_rate, eps=1e-3)


class DeterministicProGAN(ProGAN):
    def __init__(self, **init_args: Any) -> None:
        super().__init__(**init_args)
        self.has_stddev = False
        for layer in self.modules():
            if isinstance(layer, MinibatchStddev):
                layer.group_size = 1

    def adam(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), betas=(0.0, 0.99), eps=1e-3)


class DeterministicCycleGAN(CycleGAN):
    def adam(self, *networks: nn.Module) -> torch.optim.Optimizer:
        parameters = [parameter for network in networks for parameter in network.parameters()]
        return torch.optim.Adam(parameters, betas=(0.5, 0.999), eps=1e-3)


class DeterministicPerceptualSR(PerceptualSR):
    def __init__(self, **init_args: Any) -> None:
        super().__init__(**init_args)
        for module in list(self.network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(4, child.num_features))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=self.learning_rate, eps=1e-3)


class DeterministicStyleTransfer(StyleTransfer):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=self.learning_rate, eps=1e-3)
