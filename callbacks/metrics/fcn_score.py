"""FCN score: agreement between a segmentation of generated photographs and the labels from which they were generated."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.segmentation import confusion, metrics_from_confusion
from datamodules.catalog.palettes import nearest_class, palette
from datamodules.errors import UserError
from datamodules.io.paths import find_file
from modules.networks.weights import load_weights, weights_hash

METRIC_NAMES = {"pixel-accuracy": "pixel-accuracy", "class-accuracy": "class-accuracy", "class-iou": "miou/pooled"}


class FCNScore(ImageMetric):
    """Accuracy and IoU of translation from labels to photographs and back, pooled over the images of a set.

    CycleGAN, Section 5.1.1, after pix2pix (Isola et al., CVPR 2017) and FCN (Long et al., CVPR 2015). `<metric>` is
    `pixel-accuracy`, `class-accuracy` (mean over the classes in the labels) or `class-iou` (mean IoU):

    - `fcn-score/<metric>`: labels to photograph. A segmenter trained on real photographs segments the generated one; its
      classes are compared with the input labels.
    - `fcn-score-real/<metric>`: the same segmenter on real photographs of the same size, an upper bound.
    - `nearest-color/<metric>`: photograph to labels. Each pixel of the generated label map gets the class of the nearest color.

    All metrics are at the size of the true labels. The segmenter's probabilities are resized by bilinear interpolation, and
    decoded label maps by nearest-neighbor interpolation. Required outputs: {"image", "prediction": (N, 3, H, W), "mask":
    (N, H', W'), "direction": N strings}, where "AtoB" is from photographs to labels.

    Args:
        segmenter: segmentation method; its `test_step` returns the probabilities, see `modules.tasks.segmentation`.
        weights: weights file of the segmenter, see `find_file`.
        downscale: factor by which the segmenter's training images are smaller than the labels.
        palette_name: dataset that defines the colors of the label maps.
        on_validation: evaluate at validations too.
    """

    set_protocols = ()
    required_outputs = ("image", "prediction", "direction")

    def __init__(
        self,
        segmenter: LightningModule,
        weights: str,
        downscale: int = 1,
        palette_name: str = "camvid",
        on_validation: bool = False,
    ) -> None:
        super().__init__(on_validation)
        self.segmenter, self.weights, self.downscale, self.palette = segmenter, weights, downscale, palette(palette_name)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Load the weights of the segmenter before the first step.

        Raises:
            UserError: the weights are missing or belong to another network, or the segmenter has another number of classes.
        """
        if self.segmenter.num_classes != len(self.palette):
            raise UserError(
                f"FCNScore.segmenter: has {self.segmenter.num_classes} classes, but palette_name has {len(self.palette)}. "
                "Use a segmenter for these classes"
            )
        if stage == "fit" and not self.on_validation and not trainer.datamodule.test:
            return
        path = find_file(self.weights, "FCNScore.weights")
        load_weights(self.segmenter, path)
        self.evaluator_hash = weights_hash(self.segmenter.state_dict())
        self.segmenter.eval().requires_grad_(False).to(trainer.strategy.root_device)

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, Tensor]:
        """Return the confusion matrices of the image, int64 (K, K), by metric name.

        Raises:
            UserError: the dataset has no labels.
        """
        if "mask" not in outputs:
            raise UserError(f"FCNScore: {outputs['dataset'][i]} has no labels. Remove it from data.test")
        mask, generated = outputs["mask"][i].cpu(), outputs["prediction"][i]
        if outputs["direction"][i] == "AtoB":
            decoded = F.interpolate(
                nearest_class(generated, self.palette)[None, None].float(), mask.shape, mode="nearest-exact"
            )
            return {
                "nearest-color": confusion(decoded[0, 0].long(), mask, len(self.palette)),
                "fcn-score-real": self.segment_confusion(outputs["image"][i], mask),
            }
        return {"fcn-score": self.segment_confusion(generated, mask)}

    def segment_confusion(self, photograph: Tensor, mask: Tensor) -> Tensor:
        """Return the confusion matrix of a photograph (3, H, W), segmented, and a mask (H', W')."""
        size = [side // self.downscale for side in mask.shape]
        resized = F.interpolate(photograph[None].float(), size, mode="bilinear", align_corners=False, antialias=True)
        outputs: Any = self.segmenter.test_step({"image": resized}, 0)
        result = F.interpolate(outputs["prediction"], mask.shape, mode="bilinear", align_corners=False)
        return confusion(result[0].argmax(0).cpu(), mask, len(self.palette))

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        result: dict[str, float] = {}
        for name in sorted({name for matrices in states for name in matrices}):
            pooled = metrics_from_confusion(
                torch.stack([matrices[name] for matrices in states if name in matrices]), self.classes
            )
            result |= {f"{name}/{metric}": pooled[key] for metric, key in METRIC_NAMES.items()}
        return result

    @property
    def classes(self) -> list[str]:
        """Placeholder class names; only their number is used."""
        return [f"class {i}" for i in range(len(self.palette))]
