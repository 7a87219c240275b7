"""Classification: PIL baseline and inference benchmark."""

from typing import Any

import torch

from datamodules.classification import Classification
from experiments.bench.timing import median_seconds
from experiments.tasks.pil import PilCrops
from experiments.tasks.task import Task


def bench_inference(method: Any, data: Classification) -> dict[str, Any]:
    """Return "images_per_second", the images classified per second in batches of 64."""
    lightness = torch.rand(64, 1, data.size, data.size, device=method.device) * 100
    return {"images_per_second": 64 / median_seconds(lambda: method(lightness), method.device)}


TASK = Task(Classification, PilCrops, bench_inference)
