"""Backbones of detectors: ResNet and ResNeXt with a feature pyramid, or with the features of one stage, and a small network.

K. He, X. Zhang, S. Ren, J. Sun. Deep Residual Learning for Image Recognition. CVPR 2016. arXiv:1512.03385.
T.-Y. Lin et al. Feature Pyramid Networks for Object Detection. CVPR 2017. arXiv:1612.03144.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from datamodules.errors import UserError

SMALL = "small"
GROUP_CHANNELS = 8  # channels of a group in group normalization
STRIDES = {"c4": [16], "c5": [32], "fpn": [4, 8, 16, 32]}  # of the features from which RoIs are pooled


class SmallResNet(nn.Module):
    """A residual network for CPUs: one block at each of the strides 4, 8, 16 and 32.

    Args:
        channels: channels at stride 4; they double at each further stride.
        norm_layer: function from a number of channels to a normalization layer.
    """

    def __init__(self, channels: int, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.bn1 = norm_layer(channels)
        self.relu = nn.ReLU()
        self.layer1 = _block(channels, channels, norm_layer)
        self.layer2 = _block(channels, 2 * channels, norm_layer)
        self.layer3 = _block(2 * channels, 4 * channels, norm_layer)
        self.layer4 = _block(4 * channels, 8 * channels, norm_layer)
        self.inplanes = 8 * channels  # name of torchvision's ResNet
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _block(in_channels: int, out_channels: int, norm_layer: Callable[..., nn.Module]) -> nn.Sequential:
    downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, 2, bias=False), norm_layer(out_channels))
    return nn.Sequential(BasicBlock(in_channels, out_channels, 2, downsample, norm_layer=norm_layer))


class Backbone(nn.Module):
    """Features of images at one or more strides, by name: "0", "1", ..., and "pool" for anchors of a feature pyramid only.

    Args:
        body: network with the stages `layer1` ... `layer4`.
        neck: "c4" or "c5" for the features of stage 4 or 5 of the paper (`layer3`, `layer4`), "fpn" for a feature pyramid.
        fpn_channels: channels of the feature pyramid.
    """

    def __init__(self, body: nn.Module, neck: str, fpn_channels: int) -> None:
        super().__init__()
        width = body.inplanes  # channels of `layer4`
        assert isinstance(width, int)
        layers = {"c4": {"layer3": "0"}, "c5": {"layer4": "0"}}.get(neck, {f"layer{i + 1}": str(i) for i in range(4)})
        self.body = IntermediateLayerGetter(body, layers)
        if neck == "fpn":
            self.fpn = FeaturePyramidNetwork([width // 8, width // 4, width // 2, width], fpn_channels, LastLevelMaxPool())
        self.out_channels = {"c4": width // 2, "c5": width}.get(neck, fpn_channels)
        self.level_strides = STRIDES[neck]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the features of images (N, 3, H, W): (N, out_channels, H / stride, W / stride) each."""
        features = self.body(images)
        return self.fpn(features) if hasattr(self, "fpn") else OrderedDict(features)


def make_body(name: str, channels: int, norm_layer: Callable[..., nn.Module]) -> nn.Module:
    """Create a network with random weights and the stages `layer1` ... `layer4`.

    Args:
        name: a ResNet or ResNeXt of torchvision, or "small" for `SmallResNet`.
        channels: width of `SmallResNet`.
        norm_layer: function from a number of channels to a normalization layer.

    Raises:
        UserError: torchvision has no such network.
    """
    if name == SMALL:
        return SmallResNet(channels, norm_layer)
    require_resnet(name)
    return get_model(name, weights=None, norm_layer=norm_layer)


def require_resnet(name: str) -> None:
    """Require that a name is that of a ResNet or ResNeXt of torchvision.

    Raises:
        UserError: it is not.
    """
    try:
        known = name.startswith(("resnet", "resnext")) and bool(get_model_weights(name))
    except ValueError:
        known = False
    if not known:
        raise UserError(f"model.backbone: there is no '{name}'. Use small, resnet18 ... resnet152, or resnext101_64x4d")


def imagenet_url(name: str) -> str:
    """Return the address of torchvision's first weights of a ResNet or ResNeXt for ImageNet."""
    return get_model_weights(name)["IMAGENET1K_V1"].url


def frozen_norm(released: bool) -> Callable[..., nn.Module]:
    """Return batch normalization with fixed statistics, scales and shifts, for pretrained weights.

    Args:
        released: for the weights of torchvision's detectors, with which nothing is added to the variances.
    """
    return partial(FrozenBatchNorm2d, eps=0.0 if released else 1e-5)


def group_norm(channels: int) -> nn.GroupNorm:
    """Create group normalization with at most 32 groups (Wu and He, arXiv:1803.08494); it does not depend on the batch size."""
    return nn.GroupNorm(min(32, max(1, channels // GROUP_CHANNELS)), channels)


def last_stage(body: nn.Module) -> nn.Module:
    """Return `layer4` of a network without its stride, the RoI head of a C4 backbone (Figure 4, left)."""
    stage = body.layer4
    assert isinstance(stage, nn.Sequential)
    for layer in stage[0].modules():
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
            layer.stride = (1, 1)
    return stage


def load_stages(module: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
    """Load the weights of a classifier with this prefix that a module needs."""
    module.load_state_dict({name: weights[prefix + name] for name in module.state_dict()})
