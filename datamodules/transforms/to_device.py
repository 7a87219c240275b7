"""Copies from the CPU to a device without waiting."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device_async(values: Tensor | np.ndarray | Sequence[Any], device: torch.device) -> Tensor:
    """Return a tensor on the CPU, an array, or nested lists of numbers on a device; a GPU copies from page-locked memory."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
