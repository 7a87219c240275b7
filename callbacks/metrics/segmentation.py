"""Intersection over union, Dice and accuracy of predicted classes, as named protocols."""

from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from datamodules.transforms.downsample import IGNORE_INDEX


class SegmentationMetrics(ImageMetric):
    """Compares each pixel's likeliest class with the mask.

    Of TP, FP and FN, the pixels of a class that are found, wrongly taken for it, and missed, `pooled` over all pictures:

    - `iou/<class>`: TP / (TP + FP + FN); NaN for a class that is neither in a mask nor predicted anywhere.
    - `miou/pooled`: its mean over the classes that have one. The measure of VOC, CamVid and Cityscapes.
    - `miou/per-image`: the same of each picture by itself, over the classes in its mask or its prediction; mean of pictures.
    - `iou/per-image-<class 1>`, of two classes: mean over pictures, 1 where the class is neither there nor predicted.
    - `dice/pooled`: mean over classes of 2 TP / (2 TP + FP + FN).
    - `pixel-accuracy`: share of the pixels whose class is right.
    - `class-accuracy`: mean over the classes in the masks of TP / (TP + FN).

    Pixels whose mask is 255 do not count. Expects the outputs {"prediction": (N, K, H, W), "mask": (N, H, W)}.
    """

    def update(self, outputs: dict[str, Any], i: int) -> Tensor:
        """The picture's confusion matrix."""
        prediction = outputs["prediction"][i]
        return confusion(prediction.argmax(0).cpu(), outputs["mask"][i].cpu(), len(prediction))

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """See the class."""
        return metrics_from_confusion(torch.stack(states), trainer.datamodule.class_names)


def confusion(prediction: Tensor, mask: Tensor, classes: int) -> Tensor:
    """How many pixels of each class (row) are taken for each class (column): int64 (classes, classes)."""
    counted = mask != IGNORE_INDEX
    pairs = classes * mask[counted].long() + prediction[counted].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def metrics_from_confusion(confusions: Tensor, names: list[str]) -> dict[str, float]:
    """The figures of `SegmentationMetrics` from the pictures' confusion matrices (N, K, K)."""
    pooled = confusions.sum(0)
    hits = pooled.diagonal().double()
    target_counts, predicted = pooled.sum(1), pooled.sum(0)
    known = intersection_over_union(pooled)
    each = intersection_over_union(confusions)  # (N, K)
    results = {
        "miou/pooled": known.nanmean().item(),
        "miou/per-image": each.nanmean(1).nanmean().item(),
        "dice/pooled": (2 * hits / (target_counts + predicted)).nanmean().item(),
        "pixel-accuracy": (hits.sum() / pooled.sum()).item(),
        "class-accuracy": (hits / target_counts).nanmean().item(),
    }
    names = [name.replace(" ", "-") for name in names]
    if len(names) == 2:
        results[f"iou/per-image-{names[1]}"] = each[:, 1].nan_to_num(1.0).mean().item()
    return results | {f"iou/{name}": value for name, value in zip(names, known.tolist(), strict=True)}


def intersection_over_union(confusions: Tensor) -> Tensor:
    """Of each class, float64 (..., K), from confusion matrices (..., K, K); NaN where it is nowhere."""
    hits = confusions.diagonal(dim1=-2, dim2=-1).double()
    return hits / (confusions.sum(-1) + confusions.sum(-2) - hits)
