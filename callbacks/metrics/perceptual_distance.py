"""Perceptual distances of restored images, by the features of a trained network."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.psnr_ssim import luma_levels
from datamodules.errors import UserError
from datamodules.io.paths import file_hash, find_file
from modules.networks.pretrained import find_or_download
from modules.networks.squeezenet import SqueezeNetFeatures

ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


class PerceptualDistance(ImageMetric):
    """Base class of perceptual distances of each validation and test image; lower is better.

    The images are those of `psnr-y/crop<border>`: 8-bit luma without borders. It is repeated to three channels, so that methods
    for luma and for RGB are compared on the same pixels. The mean over a dataset is logged as `<dataset>/<protocol>`.

    Required outputs: {"prediction", "target"}, luma (N, 1, H, W) or RGB (N, 3, H, W) in [0, 1], with "name" and "dataset".

    Args:
        crop_border: width of the cropped border in pixels, by convention the scale.
        on_missing_weights: "skip" to skip the metric if the weights are missing; "error" to raise an error.
        on_validation: evaluate at validations too.
    """

    required_outputs = ("prediction", "target")
    protocol: ClassVar[str]
    min_side: ClassVar[int]  # pixels that the network needs

    def __init__(
        self,
        crop_border: int,
        on_missing_weights: Literal["error", "skip"] = "error",
        on_validation: bool = False,
    ) -> None:
        super().__init__(on_validation)
        self.crop_border, self.on_missing_weights = crop_border, on_missing_weights
        self.distance: nn.Module | None = None

    @abstractmethod
    def find_weights(self) -> Path:
        """Return the weights file of the network, or raise a UserError."""

    @abstractmethod
    def load(self, path: Path) -> nn.Module:
        """Return a module that computes the distances (N,) of two images (N, 3, H, W) in [0, 1], or raise a UserError."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Load the network before the first step.

        Raises:
            UserError: the weights are missing or do not fit the network.
        """
        never_evaluated = stage == "fit" and not self.on_validation and not trainer.datamodule.test
        if self.distance is not None or stage == "predict" or never_evaluated:
            return
        try:
            path = self.find_weights()
        except UserError as error:
            if self.on_missing_weights == "error":
                raise UserError(f"{error}, or set --trainer.callbacks.on_missing_weights skip") from None
            if trainer.is_global_zero:
                print(f"skipped   {self.protocol}: {error}", flush=True)
            return
        self.distance, self.evaluator_hash = self.load(path), file_hash(path)

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, float]:
        """Return the distance of one image; an empty dict if the weights are missing.

        Raises:
            UserError: the image is too small for the network.
        """
        if self.distance is None:
            return {}
        if (side := min(outputs["target"].shape[-2:]) - 2 * self.crop_border) < self.min_side:
            raise UserError(
                f"{outputs['dataset'][i]}/{outputs['name'][i]}: {side} pixels without the cropped border are too few for "
                f"{self.protocol}. Remove the image or the metric; at least {self.min_side} are needed"
            )
        device = outputs["prediction"].device
        images = [
            (luma_levels(outputs[name][i : i + 1], self.crop_border) / 255).float().expand(-1, 3, -1, -1).to(device)
            for name in ("prediction", "target")
        ]
        with torch.no_grad():
            return {self.protocol: float(self.distance.to(device)(*images))}

    def compute_images(self, states: dict[str, Any], trainer: Any) -> dict[str, dict[str, float]]:
        """Return the metrics of each image, which are its states."""
        return states


class LPIPS(PerceptualDistance):
    """LPIPS version 0.1 with AlexNet (Zhang et al., CVPR 2018), computed by torchmetrics, logged as `lpips-y/alex`."""

    protocol = "lpips-y/alex"
    min_side = 31

    def find_weights(self) -> Path:
        """Return torchvision's weights of AlexNet."""
        return find_or_download("alexnet", ALEXNET_URL, None)

    def load(self, path: Path) -> nn.Module:
        """Return LPIPS with the file of `find_weights`."""
        return LearnedPerceptualImagePatchSimilarity("alex", normalize=True)


class SqueezeNetDistance(PerceptualDistance):
    """Feature distance with SqueezeNet 1.0, without learned weights of the channels, logged as `distance-y/squeezenet1_0`.

    Args:
        weights: file, see `SqueezeNetFeatures`.
        crop_border, on_missing_weights, on_validation: see `PerceptualDistance`.
    """

    protocol = "distance-y/squeezenet1_0"
    min_side = 21

    def __init__(
        self,
        weights: str,
        crop_border: int,
        on_missing_weights: Literal["error", "skip"] = "error",
        on_validation: bool = False,
    ) -> None:
        super().__init__(crop_border, on_missing_weights, on_validation)
        self.weights = weights

    def find_weights(self) -> Path:
        """Return the file `weights`."""
        return find_file(self.weights, "weights of SqueezeNet")

    def load(self, path: Path) -> nn.Module:
        """Return the distance of the features of SqueezeNet."""
        return FeatureDistance(SqueezeNetFeatures(path))


class FeatureDistance(nn.Module):
    """Squared distance of features that are normalized to unit length over the channels.

    It is the mean over positions and the sum over layers: equation 1 of R. Zhang et al., *The Unreasonable Effectiveness of
    Deep Features as a Perceptual Metric*, CVPR 2018, with all channel weights equal to 1.

    Args:
        network: module that computes a list of features (N, C, h, w) of images (N, 3, H, W) in [0, 1].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the distances of images (N, 3, H, W) in [0, 1]: (N,)."""
        distances = [
            (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)).square().sum(1).mean((1, 2))
            for a, b in zip(self.network(prediction), self.network(target), strict=True)
        ]
        return torch.stack(distances).sum(0)
