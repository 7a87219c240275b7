"""Colorization: inputs of `predict`, PIL baseline and inference benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from callbacks.writers.image_writer import ImageWriter
from datamodules.colorization import Colorization
from datamodules.errors import UserError
from datamodules.io.user_images import PhotographInputs
from experiments.bench.timing import median_seconds
from experiments.tasks.pil import PilCrops
from experiments.tasks.task import Task
from modules.tasks.colorization import ColorizationMethod


def predict(cli: Any, files: Sequence[Path], paths: dict[str, Path], output: Path) -> tuple[PhotographInputs, ImageWriter]:
    """Set the size and the temperature of predictions, and return a dataset of photographs and a writer of colorized ones.

    Raises:
        UserError: the method has no temperature.
    """
    cli.model.prediction_side = cli.datamodule.resize
    if cli.config.temperature is not None:
        if not getattr(cli.model, "is_classification", False):
            raise UserError(f"--temperature: {cli.recipe.name} predicts no distribution of colors. Remove it")
        cli.model.temperature = cli.config.temperature
    return PhotographInputs(files, min_side=1), ImageWriter(paths)


def bench_inference(method: ColorizationMethod, data: Colorization) -> dict[str, Any]:
    """Return the megapixels colorized per second, on one photograph of the evaluation size."""
    lightness = torch.rand(1, 1, data.resize, data.resize, device=method.device) * 100
    seconds = median_seconds(lambda: method.predict_ab(lightness, {}), method.device)
    return {"megapixels_per_second": data.resize**2 / 1e6 / seconds}


TASK = Task(Colorization, PilCrops, bench_inference, predict, ("temperature",))
