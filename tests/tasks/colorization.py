"""Colorization: a small recipe, and the part of the contract that depends on the task."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.method_contract import Contract
from tests.helpers.tiny_recipes import Model, write_yaml


def write_colorization_recipe(path: Path, photos: Path, test: Path, model: Model, **data: Any) -> Path:
    """Write a colorization recipe on a folder of photographs."""
    init_args = {
        "train": str(photos),
        "val": str(test),
        "test": [str(test)],
        "size": 32,
        "resize": 48,
        "batch_size": 4,
        **data,
    }
    data = {"class_path": "datamodules.colorization.Colorization", "init_args": init_args}
    return write_yaml(path, model, data, [{"class_path": "callbacks.metrics.color_metrics.ColorMetrics"}])


class ColorizationContract(Contract):
    @pytest.fixture
    def recipe(self, workdir: Path, photos: Path, three_photos: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_colorization_recipe(workdir / "tiny.yaml", photos, three_photos, model)

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        """Rare colors are closer to those of the photographs than after 100 images."""
        values = [float(row["value"]) for row in log if row["name"].endswith("/auc/rebalanced")]
        return values[-1] > values[0] + 1.5

    def example(self) -> torch.Tensor:
        return 100 * torch.rand(1, 1, 48, 56)
