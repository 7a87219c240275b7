"""Super-resolution with perceptual losses.

J. Johnson, A. Alahi, L. Fei-Fei. Perceptual Losses for Real-Time Style Transfer and Super-Resolution. ECCV 2016.
arXiv:1603.08155, Section 4.2; the architecture is in the supplementary material. Of this part, the training script was
released, but neither the script that makes the data, nor networks, nor the histogram matching.

Differences from the paper, with reasons:

1. Images are in [0, 1], RGB, and normalized as torchvision's VGG requires.
2. Training patches are at random positions, flipped and rotated. The paper does not say how patches are chosen.
3. The output is 150 tanh + the mean of ImageNet, as in the released code, and not in 0 ... 255 as in the paper.
4. For short trainings, the learning rate can rise at the start and fall to zero along a half cosine (`warmup`, `decay`), and a
   training with the feature loss can start with the pixel loss (`pixel_images`). With the feature loss alone, the output
   saturates, and it takes many steps until its colors are right.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from skimage.exposure import match_histograms
from torch import Tensor, nn

from datamodules.errors import UserError
from modules.losses.perceptual import feature_loss, total_variation
from modules.losses.precision import to_float32
from modules.networks.transform_net import from_network_range, to_network_range
from modules.networks.vgg import FeatureNetwork, FeatureNetworkName, find_feature_weights
from modules.tasks.superresolution import SuperResolutionMethod
from modules.training.method import Batch
from modules.training.stages import Stage

Loss = Literal["pixel", "feature"]


class ResidualBlock(nn.Module):
    """Two padded 3 x 3 convolutions with batch normalization; no ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Add the residual to (N, C, H, W)."""
        return maps + self.layers(maps)


class PerceptualSR(SuperResolutionMethod):
    """Section 4.2: a network that enlarges RGB images, trained with a pixel loss or a feature reconstruction loss.

    Args:
        scale: 4 or 8.
        loss: "pixel" for the mean squared error of pixels, or "feature" for that of features (eq. 2).
        feature_network: network of the feature loss: "vgg16" (paper), "vgg19" or "vgg19-distilled".
        feature_weights: file of its weights; null for torchvision's, or for the distilled weights in the repository.
        feature_layer: layer of the feature loss.
        pixel_images: patches at the start that are trained with the pixel loss alone, if `loss` is "feature"; 0 in the paper.
        tv_weight: weight of total variation, relative to `loss`.
        match_histogram: match the histogram of each channel to that of the input (Section 4.2), except in training.
        base_channels: feature maps; 64 in the paper.
        total_images: training budget in patches; 800,000 in the paper.
        learning_rate: Adam learning rate.
        warmup: patches over which the learning rate rises; 0 in the paper.
        decay: decrease the learning rate to 0 along a half cosine; constant in the paper.

    Raises:
        UserError: with the feature loss, `pixel_images` is not below `total_images`.
    """

    channels = 3
    context = 16

    def __init__(
        self,
        scale: Literal[4, 8] = 4,
        loss: Loss = "feature",
        feature_network: FeatureNetworkName = "vgg16",
        feature_weights: str | None = None,
        feature_layer: str = "relu2_2",
        pixel_images: NonNegativeInt = 0,
        tv_weight: NonNegativeFloat = 0.0,
        match_histogram: bool = True,
        base_channels: PositiveInt = 64,
        total_images: int = 800_000,
        learning_rate: PositiveFloat = 1e-3,
        warmup: NonNegativeInt = 0,
        decay: bool = False,
    ) -> None:
        super().__init__(scale, total_images, learning_rate, warmup)
        if loss == "feature" and pixel_images >= total_images:
            raise UserError(f"model.pixel_images: {pixel_images} must be less than model.total_images, {total_images}")
        self.save_hyperparameters()
        self.loss, self.feature_layer, self.tv_weight, self.match_histogram = loss, feature_layer, tv_weight, match_histogram
        self.pixel_images, self.constant_after_warmup = pixel_images, not decay
        c = base_channels
        upsampling: list[nn.Module] = []
        for _ in range({4: 2, 8: 3}[scale]):
            upsampling += [nn.ConvTranspose2d(c, c, 3, 2, padding=1, output_padding=1), nn.BatchNorm2d(c), nn.ReLU()]
        self.network = nn.Sequential(
            nn.Conv2d(3, c, 9, padding=4),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            *(ResidualBlock(c) for _ in range(4)),
            *upsampling,
            nn.Conv2d(c, 3, 9, padding=4),
        ).to(memory_format=torch.channels_last)
        if loss == "feature":
            network = FeatureNetwork(feature_network, [feature_layer])
            self.add_reference("features", network, partial(find_feature_weights, feature_network, feature_weights))

    def forward(self, lr_image: Tensor) -> Tensor:
        """Upscale images (N, 3, h, w) in [0, 1] to (N, 3, h * scale, w * scale); the output may exceed [0, 1].

        Gray images (N, 1, h, w) are repeated to three channels, and the mean of the channels is returned.
        """
        if lr_image.shape[1] == 1:
            return self(lr_image.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
        return from_network_range(self.network(to_network_range(lr_image)))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the pixel loss or the feature loss, and total variation if it has a weight.

        Raises:
            UserError: the images are not RGB.
        """
        if batch["target"].shape[1] != self.channels:
            raise UserError(f"data.channels: {batch['target'].shape[1]} does not fit PerceptualSR. Use {self.channels}")
        prediction = self(batch["input"])
        if self.loss == "feature" and self.images_seen < self.pixel_images:
            return {"pixel": F.mse_loss(prediction, batch["target"])}
        if self.loss == "pixel":
            terms = {"pixel": F.mse_loss(prediction, batch["target"])}
        else:
            with torch.no_grad():
                target = self.features(batch["target"])
            terms = {"feature": feature_loss(self.features(prediction), target)}
        if self.tv_weight:
            terms["total_variation"] = self.tv_weight * total_variation(prediction)
        return terms

    def features(self, image: Tensor) -> Tensor:
        """Compute the features of images (N, 3, H, W) in [0, 1] at the layer of the feature loss."""
        layers: Sequence[str] = [self.feature_layer]
        return self.references["features"].network(image, layers)[self.feature_layer]

    def enlarge(self, lr_image: Tensor) -> Tensor:
        """Upscale images of any size, and match their histograms to those of the inputs if `match_histogram`."""
        images = to_float32(super().enlarge(lr_image)).clamp(0, 1)
        if not self.match_histogram:
            return images
        return torch.stack([match(image, reference) for image, reference in zip(images, lr_image, strict=True)])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create Adam (Section 4.2)."""
        return torch.optim.Adam(self.network.parameters(), lr=self.learning_rate, fused=True)

    def stages(self) -> list[Stage]:
        """Return the stages of training; the state of Adam is reset when the loss changes, because of its scale."""
        stages = super().stages()
        if self.loss == "feature" and self.pixel_images:
            stages = [stage for stage in stages if stage.start != self.pixel_images]  # the end of the warmup
            stages.append(Stage(self.pixel_images, reset_optimizers=True))
        return sorted(stages, key=lambda stage: stage.start)


def match(image: Tensor, reference: Tensor) -> Tensor:
    """Match the histogram of each channel of an image (C, H, W) to that of a reference (C, h, w)."""
    matched = match_histograms(image.cpu().numpy(), to_float32(reference).cpu().numpy(), channel_axis=0)
    return torch.from_numpy(matched).to(image)
