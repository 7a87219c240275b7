"""Feature networks for comparing generated images with real ones, and their weights files."""

from pathlib import Path
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Extractor(Protocol):
    """Protocol of feature networks; a recipe can name any class that implements it.

    The argument of the constructor is the weights file.
    """

    name: str  # part of protocol names, such as fid/<name>-50000
    url: str | None  # URL of the weights file; its name ends with the first digits of its sha256

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Extract features of uint8 images (N, C, H, W).

        Returns:
            Float32 "features" (N, F), and for a classifier also "logits" (N, K).
        """


class Inception:
    """torch-fidelity's port of the 2015 Inception network that defines FID, KID and the Inception Score.

    The features are the 2048 inputs of the last layer. The logits exclude its bias, as in the reference code.
    """

    name: ClassVar[str] = "inception-tf"
    url: ClassVar[str | None] = (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    )

    def __init__(self, weights: Path) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        layers = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=str(weights))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`; gray images are repeated to three channels."""
        features, logits = self.network.to(images.device)(images.expand(-1, 3, -1, -1))
        return {"features": features, "logits": logits}


class VGG16:
    """torchvision's VGG-16; the features are its second fully connected layer (4096) after ReLU.

    These features define improved precision and recall.
    """

    name: ClassVar[str] = "vgg16"
    url: ClassVar[str | None] = "https://download.pytorch.org/models/vgg16-397923af.pth"

    def __init__(self, weights: Path) -> None:
        from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

        self.network = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=str(weights))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`; gray images are repeated to three channels."""
        (features,) = self.network.to(images.device)(images.expand(-1, 3, -1, -1))
        return {"features": features}


class MnistLeNet:
    """LeNet-5 (LeCun et al., 1998, with ReLU and max pooling), trained on MNIST at 32 pixels.

    The features are the 84 outputs of layer F6, after ReLU.
    """

    name: ClassVar[str] = "mnist-lenet"
    url: ClassVar[str | None] = None

    def __init__(self, weights: Path) -> None:
        state_dict = torch.load(weights, map_location="cpu", weights_only=True)
        convolutions = {"c1": nn.Conv2d(1, 6, 5), "c3": nn.Conv2d(6, 16, 5), "c5": nn.Conv2d(16, 120, 5)}
        self.network = nn.ModuleDict({**convolutions, "f6": nn.Linear(120, 84), "f7": nn.Linear(84, 10)})
        self.network.load_state_dict({name.partition(".")[2]: value for name, value in state_dict.items()})
        self.network.requires_grad_(False)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`."""
        layers = self.network.to(images.device)
        maps = F.interpolate(images.float() / 255, (32, 32), mode="bilinear")
        maps = F.max_pool2d(F.relu(layers["c1"](maps)), 2)  # (N, 6, 14, 14)
        maps = F.max_pool2d(F.relu(layers["c3"](maps)), 2)  # (N, 16, 5, 5)
        features = F.relu(layers["f6"](F.relu(layers["c5"](maps)).flatten(1)))
        return {"features": features, "logits": layers["f7"](features)}
