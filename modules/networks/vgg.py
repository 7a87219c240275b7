"""VGG-16 and VGG-19 as feature extractors, and a small distilled VGG-19.

K. Simonyan, A. Zisserman. Very Deep Convolutional Networks for Large-Scale Image Recognition. ICLR 2015. arXiv:1409.1556.
H. Wang, Y. Li, Y. Wang, H. Hu, M.-H. Yang. Collaborative Distillation for Ultra-Resolution Universal Style Transfer.
CVPR 2020. arXiv:2003.08436.

A feature layer is named by its block and its convolution: relu3_2 is the output of the second convolution of the third block,
after ReLU.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from modules.networks.deterministic import Conv2d
from modules.networks.pretrained import find_or_download

FeatureNetworkName = Literal["vgg16", "vgg19", "vgg19-distilled"]
Pooling = Literal["max", "average"]
VGG16_STYLE_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")  # Johnson et al., Section 3.2
CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4), "vgg19-distilled": (2, 2, 4, 4, 4)}  # per block
WIDTHS = {"vgg16": (64, 128, 256, 512, 512), "vgg19": (64, 128, 256, 512, 512), "vgg19-distilled": (16, 32, 64, 128, 128)}
URLS: dict[str, str | None] = {
    "vgg16": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "vgg19": "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
    "vgg19-distilled": None,
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DISTILLED = "experiments/methods/style/features/vgg19-distilled.safetensors"  # up to relu4_1


class FeatureNetwork(nn.Module):
    """The convolutional layers of a network up to the deepest of some layers.

    The names of the weights are those of torchvision (`features.0.weight`). Of a weights file, only these weights are used.
    The input of VGG-16 and VGG-19 is normalized as in torchvision. The first convolution of the distilled VGG-19 includes the
    normalization, and its convolutions have reflection padding.

    Args:
        name: "vgg16", "vgg19" or "vgg19-distilled".
        layers: names of the feature layers.
        pooling: "max", as in VGG, or "average" (Gatys et al., Section 2).

    Raises:
        UserError: a layer does not exist.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: FeatureNetworkName, layers: Sequence[str], pooling: Pooling = "max") -> None:
        super().__init__()
        self.name = name
        known = layer_names(name)
        if unknown := [layer for layer in layers if layer not in known]:
            raise UserError(f"{name} has no layer {unknown[0]}. Use {known[0]} ... {known[-1]}")
        last = max(known.index(layer) for layer in layers)
        self.names: dict[int, str] = {}  # index of a module -> name of its output
        self.features = nn.Sequential()
        padding_mode: Literal["reflect", "zeros"] = "reflect" if name == "vgg19-distilled" else "zeros"
        in_channels, block = 3, 1
        for layer in known[: last + 1]:
            if not layer.startswith(f"relu{block}_"):
                self.features.append(nn.MaxPool2d(2) if pooling == "max" else nn.AvgPool2d(2))
                block += 1
            channels = WIDTHS[name][block - 1]
            self.features.append(Conv2d(in_channels, channels, 3, padding=1, padding_mode=padding_mode))
            self.features.append(nn.ReLU())
            self.names[len(self.features) - 1] = layer
            in_channels = channels
        mean, std = ((0.0,) * 3, (1.0,) * 3) if name == "vgg19-distilled" else (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # 1.5 times as fast in bfloat16 on CPUs

    def forward(self, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Compute the features of images (N, 3, H, W) in [0, 1] up to the deepest of some layers.

        Returns:
            Layer name -> (N, C, h, w).
        """
        maps = ((image - self.mean) / self.std).to(self.mean.dtype)  # that of the weights
        outputs: dict[str, Tensor] = {}
        for index, layer in enumerate(self.features):
            maps = layer(maps)
            if (name := self.names.get(index, "")) in layers:
                outputs[name] = maps
                if len(outputs) == len(set(layers)):
                    break
        return outputs

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights of these layers, in any precision; other entries are ignored.

        Raises:
            RuntimeError: entries are missing or have another shape, or the convolutions are those of another VGG.
        """
        expected = self.state_dict()
        known = convolution_names(self.name)
        found = [name for name, tensor in state_dict.items() if name.startswith("features.") and tensor.ndim == 4]
        if sorted(found, key=known.index if set(found) <= set(known) else None) != known[: len(found)]:
            raise RuntimeError(f"its convolutions are not those of {self.name}")
        return super().load_state_dict({name: state_dict[name] for name in expected if name in state_dict}, strict, assign)


def layer_names(name: FeatureNetworkName) -> list[str]:
    """Return the names of the feature layers of a network, in order; the distilled network ends at relu4_1."""
    names = [f"relu{block}_{i}" for block, count in enumerate(CONVOLUTIONS[name], 1) for i in range(1, count + 1)]
    return names[: names.index("relu4_1") + 1] if name == "vgg19-distilled" else names


def convolution_names(name: FeatureNetworkName) -> list[str]:
    """Return the names of the weights of all convolutions, in order, with the indices of torchvision."""
    names, index = [], 0
    for count in CONVOLUTIONS[name]:
        names += [f"features.{index + 2 * i}.weight" for i in range(count)]
        index += 2 * count + 1
    return names


def find_feature_weights(name: FeatureNetworkName, path: str | None) -> Path:
    """Return the weights file of a feature network, see `find_or_download`."""
    return find_or_download(name, URLS[name], path or (DISTILLED if name == "vgg19-distilled" else None))
