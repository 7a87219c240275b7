"""Content-based retrieval: do pictures whose codes are near to each other show the same?"""

from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError

AT_ONCE = 1000  # queries answered together


class PrecisionAtK(ImageMetric):
    """Precision at k: each picture of a set asks for the k nearest of all the others; the share of these that have its class.

    - `precision-at-<k>/code`: nearest by the Euclidean distance of codes.
    - `precision-at-<k>/pixels`: the same of the pixels, beside it.

    Expects the outputs {"image": (N, C, H, W), "code": (N, D), "label": (N,)}.

    Args:
        k: how many are asked for.
        on_validation: measure at validations too.
    """

    def __init__(self, k: PositiveInt = 10, on_validation: bool = False) -> None:
        super().__init__(on_validation)
        self.k = k

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be asked, before the first step."""
        if not hasattr(pl_module, "encoder"):
            raise UserError(
                f"Retrieval: {type(pl_module).__name__} has no codes; it is for modules.autoencoder and modules.vae"
            )
        if self.k < 1:
            raise UserError(f"Retrieval.k: {self.k}; at least one picture must be asked for")
        for name, images in trainer.datamodule.reference_sets.items():
            if len(images.labels) <= self.k:
                raise UserError(f"Retrieval.k: {self.k} nearest of the {len(images.labels)} pictures of {name}")

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, np.ndarray]:
        """What the picture is found by, and its class."""
        code, pixels = (outputs[name][i].flatten().float().cpu().numpy().copy() for name in ("code", "image"))
        return {"code": code, "pixels": pixels, "label": np.array(int(outputs["label"][i]))}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """See the class."""
        of = {name: torch.from_numpy(np.stack([one[name] for one in states])) for name in states[0]}
        found = {}
        for name in ("code", "pixels"):
            right = of["label"][k_nearest(of[name], self.k)] == of["label"][:, None]
            found[f"precision-at-{self.k}/{name}"] = right.double().mean().item()
        return found


def k_nearest(vectors: Tensor, k: int) -> Tensor:
    """The k nearest other rows of each row, nearest first: (N, D) to int64 (N, k)."""
    answers = []
    for first in range(0, len(vectors), AT_ONCE):
        queries = vectors[first : first + AT_ONCE]
        distances = torch.cdist(queries, vectors)
        distances[torch.arange(len(queries)), torch.arange(first, first + len(queries))] = torch.inf  # itself
        answers.append(distances.topk(k, largest=False).indices)
    return torch.cat(answers)
