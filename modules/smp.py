"""Segmentation networks of segmentation-models-pytorch: any of its architectures with any of its encoders.

They include DeepLab: L.-C. Chen, G. Papandreou, F. Schroff, H. Adam. Rethinking Atrous Convolution for Semantic
Image Segmentation. arXiv:1706.05587 (V3); L.-C. Chen, Y. Zhu, G. Papandreou, F. Schroff, H. Adam. Encoder-Decoder with Atrous
Separable Convolution for Semantic Image Segmentation. ECCV 2018. arXiv:1802.02611 (V3+).

Differences from DeepLab, with reasons:

1. AdamW replaces SGD, because its learning rate needs no new search for another encoder or dataset. The schedule is DeepLab's
   "poly".
2. Images larger than a tile are predicted in tiles, with `margin / 2` pixels of context on each side. The papers predict full
   images.

As in V3 and V3+, the loss is computed at full resolution, on the bilinearly upsampled output of the decoder.
"""

from collections.abc import Sequence

import segmentation_models_pytorch as smp
import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from datamodules.errors import UserError
from modules.networks.build import NetworkSpec, build_network
from modules.tasks.segmentation import SegmentationMethod
from modules.tasks.tiling import Tiling
from modules.training.optimizers import kernels

MAX_STRIDE = 32  # input sides must be multiples of it, for all encoders
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # statistics of RGB values in [0, 1]
STAT_BUFFERS = ("mean", "std")


class SMPSegmenter(SegmentationMethod):
    """Segmentation network with padded convolutions. With a margin of 0, border pixels of a tile have context on one side only.

    Args:
        architecture: architecture in segmentation-models-pytorch: "unet", "deeplabv3", "deeplabv3plus", "fpn", ...
        encoder_name: encoder in segmentation-models-pytorch: "resnet34", "mobilenet_v2", "tu-convnext_tiny", ...
        encoder_weights: "imagenet" for pretrained encoder weights (downloaded once), None for random weights.
        output_stride: downsampling factor of DeepLab's encoder, 8 or 16; None for the architecture's default.
        channels: image channels, 1 or 3.
        num_classes: number of classes.
        tile_size: side of an output tile in pixels.
        margin: input side of a tile minus its output side, a multiple of 32.
        tta_views: see `SegmentationMethod`.
        total_images: training budget.
        learning_rate: initial learning rate.
        weight_decay: AdamW weight decay.
        network: another network, see `build_network`: images (N, channels, H, W) of zero mean and unit variance to logits
            (N, num_classes, H, W); `architecture` and `encoder_name` are then not used.
        seed: seed of dropout in training, for networks with dropout.

    Raises:
        UserError: the architecture or the encoder does not exist, or `margin`, `tile_size` or `tta_views` is not valid.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        architecture: str = "deeplabv3plus",
        encoder_name: str = "resnet34",
        encoder_weights: str | None = "imagenet",
        output_stride: int | None = None,
        channels: int = 3,
        num_classes: int = 21,
        tile_size: int = 512,
        margin: int = 0,
        tta_views: int = 1,
        total_images: int = 300_000,
        learning_rate: PositiveFloat = 1e-3,
        weight_decay: NonNegativeFloat = 1e-4,
        network: NetworkSpec = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes, Tiling(tile_size, margin, MAX_STRIDE), tta_views, total_images, learning_rate, seed)
        self.save_hyperparameters()
        self.encoder_name, self.encoder_weights = encoder_name, encoder_weights
        self.channels, self.weight_decay = channels, weight_decay
        if margin % MAX_STRIDE:
            raise UserError(f"model.margin: {margin} is not valid. Use a multiple of {MAX_STRIDE}")
        stride_option = {} if output_stride is None else {"encoder_output_stride": output_stride}
        if network is not None and encoder_weights:
            raise UserError(f"model.encoder_weights: {encoder_weights} are not for model.network. Use null")
        try:
            default = smp.create_model(architecture, encoder_name, None, channels, num_classes, **stride_option)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip("'\"").splitlines()[0]
            raise UserError(f"model.architecture {architecture}, model.encoder_name {encoder_name}: {reason}") from None
        self.network = build_network("network", network, default)
        for name in STAT_BUFFERS:
            self.register_buffer(name, channel_stats(IMAGENET[name], channels))

    def setup(self, stage: str) -> None:
        """Load the pretrained encoder weights and their channel statistics; a checkpoint replaces them when a run resumes.

        Raises:
            UserError: the weights do not exist or cannot be downloaded.
        """
        super().setup(stage)
        if stage != "fit" or not self.encoder_weights:
            return
        try:
            pretrained = smp.encoders.get_encoder(self.encoder_name, in_channels=self.channels, weights=self.encoder_weights)
            preprocessing = smp.encoders.get_preprocessing_params(self.encoder_name, self.encoder_weights)
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"model.encoder_weights: {self.encoder_weights} weights of {self.encoder_name} are not available "
                f"({str(error).splitlines()[0]}). "
                "Use --model.encoder_weights null to start from random weights."
            ) from None
        self.network.get_submodule("encoder").load_state_dict(pretrained.state_dict())
        for name in STAT_BUFFERS:
            self.get_buffer(name).copy_(channel_stats(preprocessing[name] or IMAGENET[name], self.channels))

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits inside the margin: (N, channels, H, W) in [0, 1] to (N, num_classes, H - margin, W - margin).

        Raises:
            UserError: a side is not a multiple of 32, or a training batch has one image, too few for batch normalization.
        """
        if any(side % MAX_STRIDE for side in image.shape[-2:]):
            raise UserError(
                f"data.crop and data.margin: their sum {image.shape[-1]} is not a multiple of {MAX_STRIDE}. Change data.crop"
            )
        if self.training and len(image) == 1:
            raise UserError(
                "data.batch_size: batch normalization needs at least two images per rank and micro-batch. "
                "Increase the batch size"
            )
        logits = self.network((image - self.mean) / self.std)
        half_margin = self.tiling.margin // 2
        return logits[..., half_margin : logits.shape[-2] - half_margin, half_margin : logits.shape[-1] - half_margin]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create AdamW, without weight decay for biases and normalization parameters."""
        decayed = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        undecayed = [parameter for parameter in self.parameters() if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.learning_rate, **kernels(self.device))

    def schedule(self, images_seen: int) -> float:
        """Return the learning rate of DeepLab's "poly" schedule: `learning_rate` times (1 - progress)**0.9."""
        return self.learning_rate * (1 - min(1.0, images_seen / self.total_images)) ** 0.9


def channel_stats(values: Sequence[float], channels: int) -> Tensor:
    """Reshape RGB statistics to (1, channels, 1, 1); for one channel, use their mean."""
    stats = torch.tensor(values)
    return (stats if channels == 3 else stats.mean(0, keepdim=True)).view(1, -1, 1, 1)
