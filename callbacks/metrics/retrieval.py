"""Content-based retrieval: precision of the nearest neighbors of codes."""

from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.protocols import HasEncoder
from datamodules.errors import UserError

QUERIES_PER_BATCH = 1000  # queries per distance matrix


class PrecisionAtK(ImageMetric):
    """Precision at k: fraction of the k nearest other images of a set with the class of the query, averaged over queries.

    - `precision-at-<k>/code`: nearest by the Euclidean distance of codes.
    - `precision-at-<k>/pixels`: nearest by the Euclidean distance of pixels, a baseline.

    Required outputs: {"image": (N, C, H, W), "code": (N, D), "label": (N,)}.

    Args:
        k: number of retrieved images.
        on_validation: evaluate at validations too.
    """

    required_outputs = ("image", "code", "label")

    def __init__(self, k: PositiveInt = 10, on_validation: bool = False) -> None:
        super().__init__(on_validation)
        self.k = k

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Require codes and more than k images per set.

        Raises:
            UserError: the model has no encoder, k is less than 1, or a set has at most k images.
        """
        if not isinstance(pl_module, HasEncoder):
            raise UserError(f"PrecisionAtK: {type(pl_module).__name__} has no codes. Use modules.autoencoder or modules.vae")
        if self.k < 1:
            raise UserError(f"PrecisionAtK.k: {self.k} is too small. Use at least 1")
        for name, images in trainer.datamodule.reference_sets.items():
            if len(images.labels) <= self.k:
                raise UserError(f"PrecisionAtK.k: {self.k}, but {name} has only {len(images.labels)} images. Use a smaller k")

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, np.ndarray]:
        """Return the code, the pixels and the label of the image."""
        code, pixels = (outputs[name][i].flatten().float().cpu().numpy().copy() for name in ("code", "image"))
        return {"code": code, "pixels": pixels, "label": np.array(int(outputs["label"][i]))}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        stacked = {name: torch.from_numpy(np.stack([state[name] for state in states])) for name in states[0]}
        precision = {}
        for name in ("code", "pixels"):
            correct = stacked["label"][k_nearest(stacked[name], self.k)] == stacked["label"][:, None]
            precision[f"precision-at-{self.k}/{name}"] = correct.double().mean().item()
        return precision


def k_nearest(vectors: Tensor, k: int) -> Tensor:
    """Return the indices of the k nearest other rows of each row, nearest first: (N, D) to int64 (N, k)."""
    indices = []
    for start in range(0, len(vectors), QUERIES_PER_BATCH):
        queries = vectors[start : start + QUERIES_PER_BATCH]
        distances = torch.cdist(queries, vectors)
        distances[torch.arange(len(queries)), torch.arange(start, start + len(queries))] = torch.inf  # exclude the query itself
        indices.append(distances.topk(k, largest=False).indices)
    return torch.cat(indices)
