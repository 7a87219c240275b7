"""The Cell Tracking Challenge's measure of segmented objects."""

from typing import Any

import numpy as np
from scipy.ndimage import label

from callbacks.metrics.base import ImageMetric


class CTCSeg(ImageMetric):
    """SEG, logged as `seg/ctc`: how well each object of the truth is covered by one predicted object; the mean of them all.

    An object R is matched with the predicted S for which |R & S| > |R| / 2, of which there is one at most, and scores their
    intersection over union; without a match 0. Objects of one pixel are left out. Objects that are predicted where none is
    cost nothing. (Maska et al., Bioinformatics 2014.) Predicted objects are the connected parts, by edges, of the pixels
    whose likeliest class is 1.

    Expects the outputs {"prediction": (N, K, H, W), "cells": (N, H, W), numbers of the true objects, 0 for the ground}.
    """

    def update(self, outputs: dict[str, Any], i: int) -> np.ndarray:
        """The scores of the picture's objects."""
        cells = outputs["prediction"][i].argmax(0).cpu().numpy() == 1
        return seg_scores(outputs["cells"][i].cpu().numpy(), label(cells)[0])

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Their mean over all objects of the set; NaN if there are none."""
        of_all = np.concatenate(states)
        return {"seg/ctc": float(of_all.mean()) if len(of_all) else float("nan")}


def seg_scores(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Of each true object, in the order of their numbers, see `CTCSeg`: float64 (objects,)."""
    _, true = np.unique(np.append(true, 0), return_inverse=True)  # 0 is the ground; the numbers follow without a gap
    overlap = np.zeros((true.max() + 1, predicted.max() + 1), dtype=np.int64)
    np.add.at(overlap, (true[:-1], predicted.ravel()), 1)
    sizes, areas = overlap.sum(1), overlap.sum(0)
    best = overlap[:, 1:].argmax(1) + 1 if overlap.shape[1] > 1 else np.zeros(len(overlap), dtype=np.int64)
    shared = overlap[np.arange(len(overlap)), best] * (best > 0)
    score = np.where(2 * shared > sizes, shared / (sizes + areas[best] - shared), 0.0)
    return score[1:][sizes[1:] > 1]
