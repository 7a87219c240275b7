"""Intersection over union, Dice and accuracy of predicted classes, as named protocols."""

from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from datamodules.transforms.downsample import IGNORE_INDEX


class SegmentationMetrics(ImageMetric):
    """Metrics that compare the most likely class of each pixel with the mask.

    TP, FP and FN are the numbers of pixels of a class, pooled over all images except in `per-image` metrics:

    - `iou/<class>`: TP / (TP + FP + FN); NaN for a class that is neither in a mask nor predicted anywhere.
    - `miou/pooled`: mean IoU over the classes whose IoU is not NaN. It is the metric of VOC, CamVid and Cityscapes.
    - `miou/per-image`: mean IoU over the classes in the mask or the prediction of an image, averaged over images.
    - `iou/per-image-<class 1>`, for two classes: IoU of class 1, averaged over images; 1 for an image in which the class is
      neither in the mask nor predicted.
    - `dice/pooled`: mean of 2 TP / (2 TP + FP + FN) over the classes in a mask or predicted.
    - `pixel-accuracy`: fraction of correctly classified pixels.
    - `class-accuracy`: mean of TP / (TP + FN) over the classes in the masks.

    Pixels whose mask is 255 are ignored. Required outputs: {"prediction": (N, K, H, W), "mask": (N, H, W)}.
    """

    required_outputs = ("prediction", "mask")

    def update(self, outputs: dict[str, Any], i: int) -> Tensor:
        """Return the confusion matrix of the image, int64 (K, K)."""
        prediction = outputs["prediction"][i]
        return confusion(prediction.argmax(0).cpu(), outputs["mask"][i].cpu(), len(prediction))

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        return metrics_from_confusion(torch.stack(states), trainer.datamodule.class_names)

    def compute_image(self, state: Tensor, trainer: Any) -> dict[str, float]:
        """Return the IoU of each class in one image, their mean, and the pixel accuracy; NaN for an absent class."""
        values = metrics_from_confusion(state[None], trainer.datamodule.class_names)
        classes = [f"iou/{name.replace(' ', '-')}" for name in trainer.datamodule.class_names]
        return {"miou": values["miou/per-image"], "pixel-accuracy": values["pixel-accuracy"]} | {
            name: values[name] for name in classes
        }


def confusion(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each true class (row) and predicted class (column): int64 (num_classes, num_classes)."""
    valid = mask != IGNORE_INDEX
    pairs = num_classes * mask[valid].long() + prediction[valid].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def metrics_from_confusion(confusions: Tensor, names: list[str]) -> dict[str, float]:
    """Return the metrics of `SegmentationMetrics` from the confusion matrices of images (N, K, K)."""
    pooled = confusions.sum(0)
    hits = pooled.diagonal().double()
    target_counts, predicted_counts = pooled.sum(1), pooled.sum(0)
    class_iou = intersection_over_union(pooled)
    image_iou = intersection_over_union(confusions)  # (N, K)
    results = {
        "miou/pooled": class_iou.nanmean().item(),
        "miou/per-image": image_iou.nanmean(1).nanmean().item(),
        "dice/pooled": (2 * hits / (target_counts + predicted_counts)).nanmean().item(),
        "pixel-accuracy": (hits.sum() / pooled.sum()).item(),
        "class-accuracy": (hits / target_counts).nanmean().item(),
    }
    names = [name.replace(" ", "-") for name in names]
    if len(names) == 2:
        results[f"iou/per-image-{names[1]}"] = image_iou[:, 1].nan_to_num(1.0).mean().item()
    return results | {f"iou/{name}": value for name, value in zip(names, class_iou.tolist(), strict=True)}


def intersection_over_union(confusions: Tensor) -> Tensor:
    """Return the IoU of each class, float64 (..., K), from confusion matrices (..., K, K); NaN for absent classes."""
    hits = confusions.diagonal(dim1=-2, dim2=-1).double()
    return hits / (confusions.sum(-1) + confusions.sum(-2) - hits)
