"""Training data that lie on the GPU, where batches are cropped, resized, deformed and flipped."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Dataset

MAX_SHARE = 0.2  # of the memory of the GPU


@runtime_checkable
class Storable(Protocol):
    """A dataset of `InfiniteBatchSampler` whose decoded images can lie on a GPU."""

    @property
    def n_bytes(self) -> int:
        """Size of its images in bytes."""

    def on_device(self, device: torch.device) -> Any:
        """Return a copy whose images are on a device; interpolated pixels can differ by 1 from those of the CPU."""


@dataclass
class Slice:
    """Output of a sampler: the position of the first sample, and the items, int64 (B,)."""

    start: int
    items: np.ndarray


class DeferredItems(Dataset[dict[str, Any]]):
    """Dataset that returns the outputs of the sampler as {"slice"}; the batch is made from them on the device.

    Args:
        stored: dataset with its images on the device.
    """

    def __init__(self, stored: Any) -> None:
        self.stored = stored

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Return {"slice": `Slice`}."""
        return {"slice": Slice(*slice_)}

    def read(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch of a `Slice`, on the device."""
        content: dict[str, Any] = self.stored[batch["slice"].start, batch["slice"].items]
        return content


def fits(n_bytes: int, device: torch.device) -> bool:
    """Return whether data of this size may lie on a device: a GPU with five times as much memory.

    The result does not depend on what is free, so that a resumed run has the same batches.
    """
    return device.type == "cuda" and n_bytes <= MAX_SHARE * torch.cuda.get_device_properties(device).total_memory
