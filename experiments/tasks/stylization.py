"""Style transfer: inputs of `predict`, PIL baseline and inference benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from callbacks.writers.image_writer import ImageWriter
from datamodules.io.user_images import PhotographInputs
from datamodules.stylization import Stylization
from experiments.bench.timing import median_seconds
from experiments.tasks.pil import PilCrops
from experiments.tasks.task import Task
from modules.tasks.stylization import StylizationMethod


def predict(cli: Any, files: Sequence[Path], paths: dict[str, Path], output: Path) -> tuple[PhotographInputs, ImageWriter]:
    """Set the style, and return a dataset of photographs and a writer of stylized photographs."""
    cli.model.select(cli.config.style, 1.0 if cli.config.alpha is None else cli.config.alpha)
    return PhotographInputs(files, cli.model.min_side), ImageWriter(paths)


def bench_inference(method: StylizationMethod, data: Stylization) -> dict[str, Any]:
    """Return the megapixels stylized per second, on one photograph of the training size."""
    image, mixture = torch.rand(1, 3, data.size, data.size, device=method.device), method.mixture_of([0])
    seconds = median_seconds(lambda: method.stylize(image, mixture), method.device)
    return {"megapixels_per_second": data.size**2 / 1e6 / seconds}


TASK = Task(Stylization, PilCrops, bench_inference, predict, ("style", "alpha"))
