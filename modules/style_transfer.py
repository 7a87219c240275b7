"""Fast style transfer: a network that stylizes photographs in one forward pass.

J. Johnson, A. Alahi, L. Fei-Fei. Perceptual Losses for Real-Time Style Transfer and Super-Resolution. ECCV 2016.
arXiv:1603.08155.
V. Dumoulin, J. Shlens, M. Kudlur. A Learned Representation for Artistic Style. ICLR 2017. arXiv:1610.07629 (many styles).

Paper and released code (jcjohnson/fast-neural-style) differ. Each of these differences is an argument:

1. The content layer is relu2_2 in the paper and relu3_3 in the code.
2. The style loss sums over the entries of the Gram matrices in the paper, and takes their mean in the code (`gram`).
3. The paper has batch normalization; the code's default is instance normalization, with half of the channels in its models.

4. The output of the paper is in 0 ... 255. That of the code, used here, is 150 tanh + the mean of ImageNet.

Differences from both, with reasons:

1. Images are in [0, 1], RGB, and normalized as torchvision's VGG requires; the input of the style network is divided by 0.225.
   The loss weights therefore differ from those of the code, which has Caffe's VGG and 0 ... 255, and depend on the network.
2. Training images are random crops of resized photographs, half of them flipped. They are not resized to a square, which would
   distort them.
3. Total variation is a loss. The code adds half of its gradient, summed over the batch: its strength s corresponds to the
   weight N s / 2 for N images, before the change of the pixel range.
4. `style_size` is the shorter side of the style image. In the code, it is the longer side.
5. The learning rate is constant in the code. Short trainings are better with a linear rise at the start, without which the
   output saturates, and a half cosine to zero (`warmup`, `decay`).
6. The scales of normalization layers start at 1, in the code at random values in [0, 1].
7. The code applies a 3 x 3 median filter to its results by default, which is omitted.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.io.image_io import read_image, to_channels
from datamodules.io.paths import file_hash, find_file
from datamodules.transforms.short_side import resize_short_side
from modules.losses.perceptual import GramReduction, PerceptualObjective
from modules.networks.tiled_transform import transform_tiled
from modules.networks.transform_net import PADDING, Norm, TransformNet, Upsampling
from modules.networks.vgg import VGG16_STYLE_LAYERS, FeatureNetwork, FeatureNetworkName, find_feature_weights
from modules.tasks.stylization import StylizationMethod
from modules.training.method import Batch

TILED_PIXELS = 1024**2  # images with more pixels are processed in tiles
TILE_SIZE = 512  # pixels
MIN_STYLE_SIDE = 32  # pixels


class StyleTransfer(StylizationMethod):
    """Section 3: the image transformation network, trained with perceptual losses.

    Args:
        styles: files of the style images; more than one for a network of many styles. Their names are the file stems.
        style_size: shorter side to which style images are resized.
        feature_network: network of the losses: "vgg16" (paper), "vgg19" or "vgg19-distilled".
        feature_weights: file of its weights; null for torchvision's, or for the distilled weights in the repository.
        content_layer: layer of the feature reconstruction loss.
        style_layers: layers of the style reconstruction loss.
        content_weight, style_weight, tv_weight: weights of the losses.
        gram: "sum" over the entries of the Gram matrices (paper) or their "mean" (code).
        norm: "batch" (paper) or "instance" (code).
        upsampling: "transposed" convolutions (paper), or "nearest" upsampling and convolutions (pytorch/examples).
        base_channels: feature maps at full resolution; 32 in the paper.
        total_images: training budget; 160,000 in the paper.
        learning_rate: maximum learning rate of Adam.
        warmup: photographs over which the learning rate rises; 0 in the paper.
        decay: decrease the learning rate to 0 along a half cosine; constant in the paper.
        seed: seed of the training.

    Raises:
        UserError: there are no styles, two have the same name, `style_size` is too small, or a layer does not exist.
    """

    min_side = PADDING + 1  # of an image for `stylize`: the padding reflects it
    inference_dtype = torch.float16  # of committed weights; half of the size, with the same pictures

    def __init__(
        self,
        styles: Sequence[str],
        style_size: PositiveInt = 256,
        feature_network: FeatureNetworkName = "vgg16",
        feature_weights: str | None = None,
        content_layer: str = "relu2_2",
        style_layers: Sequence[str] = VGG16_STYLE_LAYERS,
        content_weight: NonNegativeFloat = 1.0,
        style_weight: NonNegativeFloat = 5.0,
        tv_weight: NonNegativeFloat = 1e-6,
        gram: GramReduction = "sum",
        norm: Norm = "batch",
        upsampling: Upsampling = "transposed",
        base_channels: PositiveInt = 32,
        total_images: int = 160_000,
        learning_rate: PositiveFloat = 1e-3,
        warmup: NonNegativeInt = 0,
        decay: bool = False,
        seed: int = 0,
    ) -> None:
        names = [Path(style).stem for style in styles]
        if not names:
            raise UserError("model.styles: no style is given. Give the file of a style image")
        if marked := [name for name in names if "=" in name or "," in name]:
            raise UserError(f"model.styles: {marked[0]} contains '=' or ',', which --style uses. Rename the file")
        if len(set(names)) < len(names):
            raise UserError(f"model.styles: two styles have the same name: {', '.join(names)}. Rename a file")
        if style_size < MIN_STYLE_SIDE:
            raise UserError(f"model.style_size: {style_size} is too small for a style. Use at least {MIN_STYLE_SIDE}")
        if not style_layers:
            raise UserError(f"model.style_layers: no layer is given. Use, for example, {list(VGG16_STYLE_LAYERS)}")
        super().__init__(names, total_images, learning_rate, warmup, seed)
        self.save_hyperparameters()
        self.styles, self.style_size, self.constant_after_warmup = list(styles), style_size, not decay
        self.perceptual = PerceptualObjective(
            self.features, content_layer, tuple(style_layers), content_weight, style_weight, tv_weight, gram
        )
        self.network = TransformNet(base_channels, norm, upsampling, len(names))
        network = FeatureNetwork(feature_network, [content_layer, *style_layers])
        self.add_reference("features", network, partial(find_feature_weights, feature_network, feature_weights))
        self.style_hashes: dict[str, str] = {}  # by file name
        self.target_grams = nn.Module()  # its buffers, by layer name: (number of styles, C, C)

    def forward(self, image: Tensor, mixture: Tensor) -> Tensor:
        """See `StylizationMethod.forward`; sides are at least 44 pixels.

        Raises:
            UserError: an image is smaller.
        """
        if min(image.shape[-2:]) < self.min_side:
            raise UserError(
                f"{image.shape[-1]}x{image.shape[-2]} pixels are too few for the network. Use at least 44 on each side, in "
                "training with data.size"
            )
        return self.network(image, mixture)

    def stylize(self, image: Tensor, mixture: Tensor) -> Tensor:
        """Transform images of any size, in tiles if they have more than `TILED_PIXELS` pixels; see `StylizationMethod.stylize`.

        The result is that of a single pass, see `tiled_transform`.
        """
        height, width = image.shape[-2:]
        if self.training or height * width <= TILED_PIXELS:
            return super().stylize(image, mixture)
        padded = F.pad(image.to(self.dtype), (0, -width % self.stride, 0, -height % self.stride), mode="reflect")
        return transform_tiled(self.network, padded, mixture, TILE_SIZE)[..., :height, :width]

    def setup(self, stage: str) -> None:
        """Load the feature network, and compute the Gram matrices of the styles.

        Raises:
            UserError: the weights or a style image are missing or unusable.
        """
        super().setup(stage)
        if stage == "fit":
            self.compute_target_grams()

    def compute_target_grams(self) -> None:
        """Compute the Gram matrices of the style images once.

        Raises:
            UserError: a style image is missing, unusable, or too small for the feature network.
        """
        if self.gram_matrices():
            return
        reference = self.references["features"]
        reference.load()
        paths = [find_file(style, "model.styles") for style in self.styles]
        self.style_hashes = {path.name: file_hash(path) for path in paths}
        images = [read_style(path, self.style_size) for path in paths]
        # Before a run, Lightning has not yet moved the networks to `self.device`.
        grams = [self.perceptual.style_targets(image.to(next(reference.network.parameters()))) for image in images]
        for layer in self.perceptual.style_layers:
            self.target_grams.register_buffer(layer, torch.cat([gram[layer] for gram in grams]), persistent=False)

    def file_hashes(self) -> dict[str, str]:
        """Return the sha256 of the weights of the feature network and, after `compute_target_grams`, of the style images."""
        return {**super().file_hashes(), **self.style_hashes}

    def gram_matrices(self) -> dict[str, Tensor]:
        """Return the Gram matrices of the styles by layer, (number of styles, C, C); empty before `compute_target_grams`."""
        return dict(self.target_grams.named_buffers())

    def features(self, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Compute features of images (N, 3, H, W) in [0, 1] by the loss network, see `FeatureNetwork`."""
        return self.references["features"].network(image, layers)

    # Section 3.2: perceptual losses

    def objective(self, image: Tensor, prediction: Tensor, mixture: Tensor) -> dict[str, Tensor]:
        """Compute the weighted content, style and total variation losses.

        The Gram matrices of a mixture of styles are mixed with the same weights.
        """
        with torch.autocast(image.device.type, enabled=False):
            grams = {
                layer: torch.einsum("ns,scd->ncd", mixture.to(gram.dtype), gram) for layer, gram in self.gram_matrices().items()
            }
        return self.perceptual.terms(prediction, self.perceptual.content_targets(image), grams)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the objective of stylized training images."""
        mixture = self.train_mixture(batch)
        return self.objective(batch["image"], self(batch["image"], mixture), mixture)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create Adam (Section 4.1)."""
        return torch.optim.Adam(self.network.parameters(), lr=self.learning_rate, fused=True)


def read_style(path: Path, size: int) -> Tensor:
    """Read a style image and resize its shorter side: (1, 3, H, W) in [0, 1].

    Raises:
        InvalidImage: the file is not an image.
        UserError: the image is smaller than 32 pixels.
    """
    pixels = to_channels(read_image(path), 3)
    height, width = pixels.shape[-2:]
    if min(height, width) < MIN_STYLE_SIDE:
        needed = f"{MIN_STYLE_SIDE}x{MIN_STYLE_SIDE}"
        raise UserError(f"{path}: {width}x{height} pixels, too small for a style. Use at least {needed} pixels")
    return resize_short_side(pixels, size)[None] / 255
