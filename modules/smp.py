"""Segmentation networks of segmentation-models-pytorch: any of its architectures on any of its encoders.

Among them the lectures' DeepLab: L.-C. Chen, G. Papandreou, F. Schroff, H. Adam. Rethinking Atrous Convolution for Semantic
Image Segmentation. arXiv:1706.05587 (V3); L.-C. Chen, Y. Zhu, G. Papandreou, F. Schroff, H. Adam. Encoder-Decoder with Atrous
Separable Convolution for Semantic Image Segmentation. ECCV 2018. arXiv:1802.02611 (V3+).

What we do differently from DeepLab, and why:

1. AdamW instead of SGD: it needs no search for a rate when encoder or data change. The schedule is DeepLab's "poly".
2. The loss is at full size, on what the decoder enlarges bilinearly, as in V3 and V3+.
3. Pictures larger than a tile are predicted in pieces, with `margin` pixels of context; the papers predict them whole.
"""

from collections.abc import Sequence

import segmentation_models_pytorch as smp
import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from datamodules.errors import UserError
from modules.tasks.segmentation import SegmentationMethod
from modules.tasks.tiling import Tiling

MAX_STRIDE = 32  # sides that all of the encoders take are multiples of this
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of its colours
STAT_BUFFERS = ("mean", "std")


class SMPSegmenter(SegmentationMethod):
    """Convolutions with padding: the output is of the input's size, and its border knows only half of its context.

    Args:
        architecture: of segmentation-models-pytorch: "unet", "deeplabv3", "deeplabv3plus", "fpn", ...
        encoder_name: of the same: "resnet34", "mobilenet_v2", "tu-convnext_tiny", ...
        encoder_weights: "imagenet" for what the encoder has learned there (downloaded once), None for random ones.
        output_stride: how many times smaller DeepLab's encoder makes a picture, 8 or 16; None for the architecture's own.
        channels: of an image, 1 or 3.
        classes: how many.
        tile_size: side of what is predicted at once; larger pictures come in pieces.
        margin: context of such a piece beyond what it is used for, both sides together.
        tta_views: see `SegmentationMethod`.
        total_images: training budget.
        learning_rate: at the start.
        weight_decay: of AdamW.
        seed: unused by the network; of the noise in training.
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
        classes: int = 21,
        tile_size: int = 512,
        margin: int = 0,
        tta_views: int = 1,
        total_images: int = 300_000,
        learning_rate: PositiveFloat = 1e-3,
        weight_decay: NonNegativeFloat = 1e-4,
        seed: int = 0,
    ) -> None:
        super().__init__(classes, Tiling(tile_size, margin, MAX_STRIDE), tta_views, total_images, learning_rate, seed)
        self.save_hyperparameters()
        self.encoder_name, self.encoder_weights = encoder_name, encoder_weights
        self.channels, self.weight_decay = channels, weight_decay
        if margin % MAX_STRIDE:
            raise UserError(f"model.margin: {margin} is not a multiple of {MAX_STRIDE}")
        stride = {} if output_stride is None else {"encoder_output_stride": output_stride}
        try:
            self.network = smp.create_model(architecture, encoder_name, None, channels, classes, **stride)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip("'\"").splitlines()[0]
            raise UserError(f"model.architecture {architecture}, model.encoder_name {encoder_name}: {reason}") from None
        for name in STAT_BUFFERS:
            self.register_buffer(name, channel_stats(IMAGENET[name], channels))

    def setup(self, stage: str) -> None:
        """Fetch what the encoder has learned elsewhere, and the colours it expects; a resumed run then takes its checkpoint's.

        Raises:
            Refused: it cannot be had.
        """
        if stage != "fit" or not self.encoder_weights:
            return
        try:
            pretrained = smp.encoders.get_encoder(self.encoder_name, in_channels=self.channels, weights=self.encoder_weights)
            expected = smp.encoders.get_preprocessing_params(self.encoder_name, self.encoder_weights)
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"model.encoder_weights: {self.encoder_weights} weights of {self.encoder_name} cannot be had "
                f"({str(error).splitlines()[0]}); "
                "--model.encoder_weights null begins with random ones"
            ) from None
        self.network.encoder.load_state_dict(pretrained.state_dict())
        for name in STAT_BUFFERS:
            self.get_buffer(name).copy_(channel_stats(expected[name] or IMAGENET[name], self.channels))

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the pixels within the margin: (N, channels, H, W) in [0, 1] to (N, classes, H - margin, W - margin).

        Raises:
            Refused: the sides cannot be halved so often, or a training batch has too few images for its statistics.
        """
        if any(side % MAX_STRIDE for side in image.shape[-2:]):
            raise UserError(f"data.crop and data.margin: {image.shape[-1]} together is not a multiple of {MAX_STRIDE}")
        if self.training and len(image) == 1:
            raise UserError("data.batch_size: batch normalisation needs two images at least in each process and part")
        logits = self.network((image - self.mean) / self.std)
        half = self.tiling.margin // 2
        return logits[..., half : logits.shape[-2] - half, half : logits.shape[-1] - half]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for all; no decay for gains and biases."""
        decayed = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        undecayed = [parameter for parameter in self.parameters() if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.learning_rate)

    def schedule(self, images_seen: int) -> float:
        """DeepLab's "poly": the rate times (1 - progress)**0.9."""
        return self.learning_rate * (1 - min(1.0, images_seen / self.total_images)) ** 0.9


def channel_stats(values: Sequence[float], channels: int) -> Tensor:
    """A value a colour as (1, channels, 1, 1); of one channel, their mean."""
    known = torch.tensor(values)
    return (known if channels == 3 else known.mean(0, keepdim=True)).view(1, -1, 1, 1)
