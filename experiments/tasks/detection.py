"""Detection: inputs of `predict`, PIL baseline and inference benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from callbacks.writers.detection_writer import DetectionWriter
from datamodules.catalog.annotated_images import CocoAnnotatedImage, DigitSceneImage, LabelMapImage, list_annotated_images
from datamodules.detection import Detection
from datamodules.io.user_images import PhotographInputs
from experiments.bench.timing import median_seconds
from experiments.tasks.task import Task
from modules.tasks.detection import DetectionMethod

DEFAULT_SCORE = 0.5


def predict(cli: Any, files: Sequence[Path], paths: dict[str, Path], output: Path) -> tuple[Dataset[Any], DetectionWriter]:
    """Return a dataset of photographs and a writer of detections with at least the score `--score`."""
    score = DEFAULT_SCORE if cli.config.score is None else cli.config.score
    data = cli.datamodule
    return PhotographInputs(files, min_side=1), DetectionWriter(paths, output, score, data.class_names, data.skeleton)
