"""Variants of the methods for comparisons of runs with different rounding or a different number of ranks.

Rounding determines the null space basis of SOAP's first preconditioner: two runs that differ by 1e-16 take different steps.
Adam with a large epsilon is smooth for gradients near zero. Dropout and the statistics of batch normalization differ between
ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image

from modules.colorization import ColorfulColorization
from modules.cyclegan import CycleGAN
from modules.dcgan import DCGAN
from modules.espcn import ESPCN
from modules.gan import GAN
from modules.mask_rcnn import MaskRCNN
from modules.networks.progressive import MinibatchStddev
from modules.networks.rcnn import ProposalNetwork
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


class FirstSamples:
    """In place of torchvision's sampler of anchors and proposals, which draws at random: takes the first ones."""

    def __init__(self, count: int, positive_fraction: float) -> None:
        self.count, self.max_positive = count, int(count * positive_fraction)

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positives = [(label >= 1) & ((label >= 1).cumsum(0) <= self.max_positive) for label in labels]
        limits = [self.count - int(positive.sum()) for positive in positives]
        negatives = [(label == 0) & ((label == 0).cumsum(0) <= limit) for label, limit in zip(labels, limits, strict=True)]
        return positives, negatives


class AnchorsAsBoxes(BoxCoder):
    """Decodes each anchor to itself: whether a proposal matches an object does not depend on rounding."""

    def decode(self, rel_codes: Tensor, boxes: list[Tensor]) -> Tensor:
        return torch.cat(boxes)[:, None]


class FixedProposals(ProposalNetwork):
    """Takes every 50th anchor in training, because the order of the scores of an untrained network is that of their rounding."""

    def filter_proposals(self, proposals: Tensor, objectness: Tensor, image_shapes: Any, num_anchors_per_level: Any) -> Any:
        if not self.training:
            return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        chosen = [clip_boxes_to_image(boxes[::50], shape) for boxes, shape in zip(proposals, image_shapes, strict=True)]
        return [boxes[(boxes[:, 2:] - boxes[:, :2]).min(1).values > 1] for boxes in chosen], []


class DeterministicMaskRCNN(MaskRCNN):
    def __init__(self, **init_args: Any) -> None:
        super().__init__(**init_args)
        self.rpn.__class__ = FixedProposals
        self.rpn.box_coder = AnchorsAsBoxes((1.0, 1.0, 1.0, 1.0))
        self.rpn.fg_bg_sampler = FirstSamples(init_args["anchors_per_image"], 0.5)
        self.roi_heads.fg_bg_sampler = FirstSamples(init_args["rois_per_image"], 0.25)
