"""The FCN score: does a segmentation network find in a made photograph the labels that it was made from?"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.segmentation import confusion, metrics_from_confusion
from callbacks.run.checkpoints import load_weights, weights_hash
from datamodules.catalog.catalog import data_root
from datamodules.catalog.palettes import nearest_class, palette
from datamodules.errors import UserError

ROOT = Path(__file__).parents[2]
METRIC_NAMES = {"pixel-accuracy": "pixel-accuracy", "class-accuracy": "class-accuracy", "class-iou": "miou/pooled"}


class FCNScore(ImageMetric):
    """Accuracy and IoU of labels to photographs and back, pooled over the pictures of a set.

    CycleGAN, Section 5.1.1, after pix2pix (Isola et al., CVPR 2017) and FCN (Long et al., CVPR 2015). Per-pixel accuracy,
    per-class accuracy (mean over the classes in the labels), class IoU (mean):

    - `fcn-score/<figure>`: labels to photograph. A judge, trained on real photographs, tells the classes of the made one,
      which are compared with the labels that it was made from.
    - `fcn-score-real/<figure>`: the same judge on the real photographs, as large as the made ones: the ceiling.
    - `nearest-color/<figure>`: photograph to labels. Each pixel of the made label map is the class whose colour is nearest.

    All are in the size of the true labels, to which the judge's picture is enlarged bilinearly; so are made label maps, after
    their colours have been decoded, by what is nearest. Expects the outputs {"image", "prediction": (N, 3, H, W),
    "mask": (N, H', W'), "direction"}: "AtoB" from photographs to labels.

    Args:
        segmenter: a method that segments; its `test_step` gives the probabilities, see `modules.tasks.segmentation`.
        weights: its file: as it is, or below the data root, or below this project.
        downscale: how many times smaller than the labels the pictures are that the judge knows.
        palette_name: the set that the label maps' colours are of.
        on_validation: measure at validations too.
    """

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
        """Find the judge's weights before anything else is done.

        Raises:
            Refused: there are none, or they are another network's, or it knows other classes.
        """
        if self.segmenter.classes != len(self.palette):
            raise UserError(
                f"FCNScore.segmenter knows {self.segmenter.classes} classes, but there are {len(self.palette)} colours"
            )
        if stage == "fit" and not self.on_validation and not trainer.datamodule.test:
            return
        path = find_segmenter_weights(self.weights)
        load_weights(self.segmenter, path)
        self.evaluator_hash = weights_hash(self.segmenter.state_dict())
        self.segmenter.eval().requires_grad_(False).to(trainer.strategy.root_device)

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, Tensor]:
        """The picture's confusion matrices, by what they are of."""
        if "mask" not in outputs:
            raise UserError(f"FCNScore: {outputs['dataset'][i]} has no labels; take it out of data.test")
        mask, made = outputs["mask"][i].cpu(), outputs["prediction"][i]
        if outputs["direction"][i] == "AtoB":
            decoded = F.interpolate(nearest_class(made, self.palette)[None, None].float(), mask.shape, mode="nearest-exact")
            return {
                "nearest-color": confusion(decoded[0, 0].long(), mask, len(self.palette)),
                "fcn-score-real": self.segment_confusion(outputs["image"][i], mask),
            }
        return {"fcn-score": self.segment_confusion(made, mask)}

    def segment_confusion(self, photograph: Tensor, mask: Tensor) -> Tensor:
        """The confusion matrix of the judge's classes with the labels; in full precision, whatever the run's."""
        size = [side // self.downscale for side in mask.shape]
        with torch.autocast(photograph.device.type, enabled=False):
            seen = F.interpolate(photograph[None].float(), size, mode="bilinear", align_corners=False, antialias=True)
            outputs: Any = self.segmenter.test_step({"image": seen}, 0)
            found = F.interpolate(outputs["prediction"], mask.shape, mode="bilinear", align_corners=False)
        return confusion(found[0].argmax(0).cpu(), mask, len(self.palette))

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """See the class."""
        found: dict[str, float] = {}
        for name in sorted({name for matrices in states for name in matrices}):
            pooled = metrics_from_confusion(
                torch.stack([matrices[name] for matrices in states if name in matrices]), self.classes
            )
            found |= {f"{name}/{called}": pooled[figure] for called, figure in METRIC_NAMES.items()}
        return found

    @property
    def classes(self) -> list[str]:
        """Names for the classes; only their number matters."""
        return [f"class {i}" for i in range(len(self.palette))]


def find_segmenter_weights(weights: str) -> Path:
    """The file of a judge's weights.

    Raises:
        Refused: there is none.
    """
    for path in (Path(weights), data_root() / weights, ROOT / weights):
        if path.is_file():
            return path
    raise UserError(f"FCNScore.weights: no file {weights}, neither here nor below {data_root()} or the project; train it first")
