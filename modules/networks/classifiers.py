"""Image classifiers with published weights."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.resnet import BasicBlock

from datamodules.errors import UserError
from modules.networks.weights import read_weights_file

CIFAR10_NAMES = {f"cifar10-resnet{6 * count + 2}": count for count in (3, 5, 7, 9, 18)}  # residual blocks of each width
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB


def find_classifier(name: str) -> "Classifier":
    """Return a classifier by its name; it has no network until its weights are loaded.

    Args:
        name: model of torchvision for ImageNet, such as "vgg16", or one of `CIFAR10_NAMES`.

    Raises:
        UserError: there is no such classifier.
    """
    return Cifar10ResNet(CIFAR10_NAMES[name]) if name in CIFAR10_NAMES else TorchvisionClassifier(name)


class Classifier(ABC):
    """A frozen classifier.

    Args:
        url: address of the weights, see `find_or_download`; None if they cannot be downloaded.
        n_classes: number of classes.
    """

    network: nn.Module  # after `load`

    def __init__(self, url: str | None, n_classes: int) -> None:
        self.url, self.n_classes = url, n_classes

    @abstractmethod
    def build_network(self) -> nn.Module:
        """Build the network that has the weights."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Compute the logits (N, K) of uint8 images (N, 3, H, W)."""

    def load(self, path: Path, device: torch.device | str = "cpu") -> None:
        """Load a weights file and freeze the network; its names can have the prefix of `nn.DataParallel`.

        Raises:
            UserError: the file does not contain the weights of the classifier.
        """
        content = read_weights_file(path)
        self.network = self.build_network().to(device).eval().requires_grad_(False)
        try:
            weights = dict(content.get("state_dict", content))
            self.network.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{path} does not contain the weights of the classifier: {reason}. Use another file") from None


class TorchvisionClassifier(Classifier):
    """A classifier of ImageNet in torchvision, for its default weights: inputs are resized and cropped as they require.

    Args:
        name: name of the model.

    Raises:
        UserError: torchvision has no such classifier.
    """

    def __init__(self, name: str) -> None:
        try:
            default = get_model_weights(name)["DEFAULT"]
        except (ValueError, KeyError):
            default = None
        if default is None or len(default.meta.get("categories", [])) != 1000:
            known = ", ".join(CIFAR10_NAMES)
            raise UserError(f"classifier: '{name}' is neither a classifier of torchvision, such as vgg16, nor one of {known}")
        super().__init__(default.url, 1000)
        self.name, self.transforms = name, default.transforms()

    def build_network(self) -> nn.Module:
        """See `Classifier`."""
        return get_model(self.name)

    def __call__(self, images: Tensor) -> Tensor:
        """See `Classifier`."""
        return self.network(self.transforms(images))


class Cifar10ResNet(Classifier):
    """The ResNet for CIFAR-10 with 6 n + 2 layers (He et al., arXiv:1512.03385, Section 4.2, shortcuts without parameters).

    Inputs are normalized with the mean and the standard deviation of ImageNet, as the published weights require.

    Args:
        count: n, number of residual blocks of each width.
    """

    def __init__(self, count: int) -> None:
        super().__init__(None, 10)
        self.count = count

    def build_network(self) -> nn.Module:
        """See `Classifier`."""
        layers = OrderedDict(
            conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(16),
            relu=nn.ReLU(),
            layer1=residual_blocks(16, 16, self.count, 1),
            layer2=residual_blocks(16, 32, self.count, 2),
            layer3=residual_blocks(32, 64, self.count, 2),  # (N, 64, 8, 8)
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(64, 10),
        )
        return nn.Sequential(layers)

    def __call__(self, images: Tensor) -> Tensor:
        """See `Classifier`; images are resized to 32 x 32 pixels."""
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        images = F.interpolate(images.float() / 255, (32, 32), mode="bilinear", antialias=True)
        return self.network((images - mean) / std)


class Shortcut(nn.Module):
    """Every second pixel, with zeros for the new channels: option A of He et al.

    Args:
        before, after: channels of the input and of the output.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.pad = (after - before) // 2

    def forward(self, maps: Tensor) -> Tensor:
        """Reduce (N, before, H, W) to (N, after, H / 2, W / 2)."""
        return F.pad(maps[..., ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


def residual_blocks(before: int, after: int, count: int, stride: int) -> nn.Sequential:
    """Build `count` residual blocks, of which the first has the stride."""
    first = BasicBlock(before, after, stride, Shortcut(before, after) if stride > 1 else None)
    return nn.Sequential(first, *[BasicBlock(after, after) for _ in range(count - 1)])
