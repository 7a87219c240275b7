"""SEG, the segmentation metric of the Cell Tracking Challenge."""

from typing import Any

import numpy as np
from scipy.ndimage import label

from callbacks.metrics.base import ImageMetric
from datamodules.transforms.objects import decode_masks, label_map


class CTCSeg(ImageMetric):
    """SEG, logged as `seg/ctc`: mean intersection over union of the true objects and their matching predicted objects.

    A true object R matches the predicted object S for which |R & S| > |R| / 2; at most one S does. A true object without a
    match scores 0. True objects of one pixel are excluded, and false positives are not penalized (Maska et al.,
    Bioinformatics 2014). Predicted objects are the edge-connected components of the pixels whose most likely class is 1.

    Required outputs: {"prediction": (N, K, H, W), "instance_ids": (N, H, W), labels of the true objects, 0 for background}.
    """

    required_outputs = ("prediction", "instance_ids")

    def update(self, outputs: dict[str, Any], i: int) -> np.ndarray:
        """Return the scores of the objects in the image: float64 (objects,)."""
        cells = outputs["prediction"][i].argmax(0).cpu().numpy() == 1
        return seg_scores(outputs["instance_ids"][i].cpu().numpy(), label(cells)[0])

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the mean over all objects of the set; NaN if there are none."""
        scores = np.concatenate(states)
        return {"seg/ctc": float(scores.mean()) if len(scores) else float("nan")}


class CTCSegOfDetections(ImageMetric):
    """SEG of detected objects, logged as `seg/ctc/score0.5`: see `CTCSeg`.

    Predicted objects are the masks of the detections with a score of at least 0.5. A pixel in several masks belongs to the one
    with the highest score.

    Required outputs: "prediction" and "annotations", see `DetectionOutputs`, with masks.

    Args:
        score: lowest score of a detection; the protocol ends with it.
        on_validation: evaluate at validations too, otherwise only at tests.
    """

    required_outputs = ("prediction", "annotations")

    def __init__(self, score: float = 0.5, on_validation: bool = True) -> None:
        super().__init__(on_validation)
        self.score = score

    def update(self, outputs: dict[str, Any], i: int) -> np.ndarray:
        """Return the scores of the objects in the image: float64 (objects,)."""
        found, true = outputs["prediction"][i], outputs["annotations"][i]
        height, width = outputs["image"][i].shape[-2:]
        predicted = label_map(found["masks"][found["scores"] >= self.score])
        return seg_scores(label_map(decode_masks(true["masks"], height, width)).numpy(), predicted.cpu().numpy())

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the mean over all objects of the set; NaN if there are none."""
        scores = np.concatenate(states)
        return {f"seg/ctc/score{self.score:g}": float(scores.mean()) if len(scores) else float("nan")}


def seg_scores(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the score of each true object, in the order of their labels, see `CTCSeg`: float64 (objects,)."""
    _, true = np.unique(np.append(true, 0), return_inverse=True)  # consecutive labels, 0 is the background
    overlap = np.zeros((true.max() + 1, predicted.max() + 1), dtype=np.int64)
    np.add.at(overlap, (true[:-1], predicted.ravel()), 1)
    true_areas, predicted_areas = overlap.sum(1), overlap.sum(0)
    best = overlap[:, 1:].argmax(1) + 1 if overlap.shape[1] > 1 else np.zeros(len(overlap), dtype=np.int64)
    intersection = overlap[np.arange(len(overlap)), best] * (best > 0)
    score = np.where(2 * intersection > true_areas, intersection / (true_areas + predicted_areas[best] - intersection), 0.0)
    return score[1:][true_areas[1:] > 1]
