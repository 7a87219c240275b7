"""Colorization: a small recipe, and the part of the contract that depends on the task."""

from pathlib import Path
from typing import Any, ClassVar

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
    max_loss_ratio: ClassVar[float]  # last to first loss of the long run

    @pytest.fixture
    def recipe(self, workdir: Path, photos: Path, three_photos: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_colorization_recipe(workdir / "tiny.yaml", photos, three_photos, model)

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        """The loss of the last eighth of the steps is lower than that of the first; metrics of three crops are too noisy."""
        losses = [float(row["value"]) for row in log if row["name"].startswith("train/")]
        count = len(losses) // 8
        return sum(losses[-count:]) < self.max_loss_ratio * sum(losses[:count])

    def example(self) -> torch.Tensor:
        return 100 * torch.rand(1, 1, 48, 56)
