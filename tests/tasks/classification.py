"""Classification: a small recipe, and the part of the contract that depends on the task."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from datamodules.catalog.array_readers import read_split
from tests.helpers.method_contract import Contract
from tests.helpers.tiny_recipes import Model, write_yaml


def write_digits(folder: Path) -> Path:
    """Write the first 60 test digits, one folder for each class; all metrics take less time than with all 500."""
    for i, (image, label) in enumerate(zip(*read_split("digits/test"), strict=True)):
        if i < 60:
            (folder / str(int(label))).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / str(int(label)) / f"{i}.png")
    return folder


def write_classification_recipe(path: Path, model: Model, **data: Any) -> Path:
    """Write a classification recipe on the embedded digits."""
    digits = str(write_digits(path.parent / "some_digits"))
    init_args = {
        "train": "digits/train",
        "val": digits,
        "test": [digits],
        "size": 24,
        "resize": 28,
        "batch_size": 4,
        **data,
    }
    data = {"class_path": "datamodules.classification.Classification", "init_args": init_args}
    return write_yaml(path, model, data, [{"class_path": "callbacks.metrics.accuracy.Accuracy"}])


class ClassificationContract(Contract):
    min_accuracy: ClassVar[float]  # of the best layer, in percent; 10 for guessing

    @pytest.fixture
    def recipe(self, workdir: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_classification_recipe(workdir / "tiny.yaml", model)

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        last = {row["name"]: float(row["value"]) for row in log if "/top1/" in row["name"]}
        return max(last.values()) > self.min_accuracy

    def example(self) -> torch.Tensor:
        return 100 * torch.rand(2, 1, 24, 24)
