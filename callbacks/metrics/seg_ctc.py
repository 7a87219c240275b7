"""SEG, the segmentation metric of the Cell Tracking Challenge."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.ndimage import label, maximum_filter, minimum_filter

from callbacks.metrics.base import ImageMetric
from datamodules.transforms.downsample import IGNORE_INDEX
from datamodules.transforms.objects import decode_masks, label_map


class CTCSeg(ImageMetric):
    """SEG, logged as `seg/ctc`: mean intersection over union of the true objects and their matching predicted objects.

    `seg/ctc/touching` is the mean over the true objects that touch another true object, if there are any.

    A true object R matches the predicted object S for which |R & S| > |R| / 2; at most one S does. A true object without a
    match scores 0. True objects of one pixel are excluded, and false positives are not penalized (Maska et al.,
    Bioinformatics 2014). Predicted objects are the edge-connected components of the pixels whose most likely class is 1.

    Pixels whose mask is 255 are ignored: they belong to no object. Required outputs: {"prediction": (N, K, H, W), "mask" and
    "instance_ids": (N, H, W), labels of the true objects, 0 for background}.
    """

    required_outputs = ("prediction", "mask", "instance_ids")

    def update(self, outputs: dict[str, Any], i: int) -> np.ndarray:
        """Return the scores of the objects in the image, and 1 for each that touches another: float64 (2, objects)."""
        counted = outputs["mask"][i].cpu().numpy() != IGNORE_INDEX
        cells = (outputs["prediction"][i].argmax(0).cpu().numpy() == 1) & counted
        true = outputs["instance_ids"][i].cpu().numpy() * counted
        return np.stack([seg_scores(true, label(cells)[0]), touching_objects(true)])

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the means over the objects of the set; that over all is NaN if there are none."""
        return seg_means(states, "seg/ctc")

    def compute_image(self, state: np.ndarray, trainer: Any) -> dict[str, float]:
        """Return the mean over the objects of one image."""
        return seg_means([state], "seg/ctc")


class CTCSegOfDetections(ImageMetric):
    """SEG of detected objects, logged as `seg/ctc/score0.5` and `seg/ctc/score0.5/touching`: see `CTCSeg`.

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
        """Return the scores of the objects in the image, and 1 for each that touches another: float64 (2, objects)."""
        found, true = outputs["prediction"][i], outputs["annotations"][i]
        height, width = outputs["image"][i].shape[-2:]
        predicted = label_map(found["masks"][found["scores"] >= self.score]).cpu().numpy()
        objects = label_map(decode_masks(true["masks"], height, width)).numpy()
        return np.stack([seg_scores(objects, predicted), touching_objects(objects)])

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the means over the objects of the set; that over all is NaN if there are none."""
        return seg_means(states, f"seg/ctc/score{self.score:g}")

    def compute_image(self, state: np.ndarray, trainer: Any) -> dict[str, float]:
        """Return the mean over the objects of one image."""
        return seg_means([state], f"seg/ctc/score{self.score:g}")


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


def touching_objects(true: np.ndarray) -> np.ndarray:
    """Return for each object of `seg_scores` whether a pixel of another is among the eight neighbors of its pixels."""
    largest, smallest = maximum_filter(true, 3), minimum_filter(np.where(true == 0, true.max() + 1, true), 3)
    touching = true[(true > 0) & ((largest != true) | (smallest != true))]
    labels, areas = np.unique(true[true > 0], return_counts=True)
    return np.isin(labels, touching)[areas > 1]


def seg_means(states: Sequence[np.ndarray], name: str) -> dict[str, float]:
    """Return the mean score of all objects as `name`, and of the touching objects as `name`/touching.

    Args:
        states: for each image, the scores and whether the objects touch another, float64 (2, objects).
        name: the protocol.
    """
    scores, touching = np.concatenate(states, axis=1)
    means = {name: float(scores.mean()) if len(scores) else float("nan")}
    return {**means, f"{name}/touching": float(scores[touching > 0].mean())} if touching.any() else means
