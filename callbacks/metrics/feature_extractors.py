"""Networks in whose features generated images are compared with real ones, and where their weights are found."""

import hashlib
from pathlib import Path
from pickle import UnpicklingError
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.catalog.catalog import data_root
from datamodules.errors import UserError


class Extractor(Protocol):
    """A network that looks at images; any class of this form can be named in a recipe.

    Its constructor takes the file of its weights.
    """

    name: str  # in protocols: fid/<name>-50000
    url: str | None  # where its weights can be had, their names ending with the first digits of their sha256

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Looks at uint8 images (N, C, H, W).

        Returns:
            "features" (N, F), and "logits" (N, K) where it is a classifier; float32.
        """


class Inception:
    """torch-fidelity's copy of the Inception of 2015 that FID, KID and the Inception Score are defined by.

    Its features are those before the last layer (2048); its logits lack the bias, as in the scores' own code.
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
        """See `Extractor`; grey images are repeated to three channels."""
        features, logits = self.network.to(images.device)(images.expand(-1, 3, -1, -1))
        return {"features": features, "logits": logits}


class VGG16:
    """torchvision's VGG-16, whose second hidden layer (4096) improved precision and recall are defined by."""

    name: ClassVar[str] = "vgg16"
    url: ClassVar[str | None] = "https://download.pytorch.org/models/vgg16-397923af.pth"

    def __init__(self, weights: Path) -> None:
        from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

        self.network = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=str(weights))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`; grey images are repeated to three channels."""
        (features,) = self.network.to(images.device)(images.expand(-1, 3, -1, -1))
        return {"features": features}


class MnistLeNet:
    """LeNet-5 (LeCun et al., 1998, with ReLU and max pooling), trained on MNIST at 32 pixels.

    Its features are those of layer F6 (84).
    """

    name: ClassVar[str] = "mnist-lenet"
    url: ClassVar[str | None] = None

    def __init__(self, weights: Path) -> None:
        stored = torch.load(weights, map_location="cpu", weights_only=True)
        convolutions = {"c1": nn.Conv2d(1, 6, 5), "c3": nn.Conv2d(6, 16, 5), "c5": nn.Conv2d(16, 120, 5)}
        self.network = nn.ModuleDict({**convolutions, "f6": nn.Linear(120, 84), "f7": nn.Linear(84, 10)})
        self.network.load_state_dict({name.partition(".")[2]: value for name, value in stored.items()})
        self.network.requires_grad_(False)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`."""
        layers = self.network.to(images.device)
        maps = F.interpolate(images.float() / 255, (32, 32), mode="bilinear")
        maps = F.max_pool2d(F.relu(layers["c1"](maps)), 2)  # (N, 6, 14, 14)
        maps = F.max_pool2d(F.relu(layers["c3"](maps)), 2)  # (N, 16, 5, 5)
        features = F.relu(layers["f6"](F.relu(layers["c5"](maps)).flatten(1)))
        return {"features": features, "logits": layers["f7"](features)}


def find_weights(extractor: type[Extractor], given: str | None) -> Path:
    """The file of an extractor's weights: the one that is named, else from torch's cache, else downloaded into it.

    Args:
        extractor: whose.
        given: a path, as it is or below the data root.

    Raises:
        Refused: there is none and it cannot be had, or it holds more than tensors.
    """
    if given is not None:
        path = next((path for path in (Path(given), data_root() / given) if path.is_file()), None)
        if path is None:
            raise UserError(f"weights of {extractor.name}: no file {given}, neither here nor below {data_root()}")
    elif extractor.url is None:
        raise UserError(f"weights of {extractor.name}: name their file, they cannot be downloaded")
    else:
        path = Path(torch.hub.get_dir()) / "checkpoints" / extractor.url.rpartition("/")[2]
        if not path.is_file():
            _download(extractor, path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run what it holds
    except (OSError, EOFError, ValueError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as weights: {' '.join(str(error).split())}") from None
    return path


def _download(extractor: type[Extractor], path: Path) -> None:
    url = str(extractor.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: another checksum
        raise UserError(
            f"weights of {extractor.name} could not be fetched from {url} ({error}); put the file at {path}, name one by "
            "`weights`, or set `on_missing_weights: skip`"
        ) from None


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
