"""Style transfer: a small recipe, and the part of the contract that depends on the task."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.helpers.method_contract import Contract
from tests.helpers.tiny_recipes import Model, write_yaml


def write_stylization_recipe(path: Path, photos: Path, test: Path, model: Model, **data: Any) -> Path:
    """Write a style transfer recipe on a folder of photographs."""
    init_args = {
        "train": str(photos),
        "val": str(test),
        "test": [str(test)],
        "size": 64,
        "resize": 72,
        "batch_size": 4,
        **data,
    }
    data = {"class_path": "datamodules.stylization.Stylization", "init_args": init_args}
    return write_yaml(path, model, data, [{"class_path": "callbacks.metrics.style_objective.StyleObjective"}])


class StylizationContract(Contract):
    max_objective_ratio: ClassVar[float]  # of the last validation to the first

    @pytest.fixture
    def recipe(self, workdir: Path, photos: Path, three_photos: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_stylization_recipe(workdir / "tiny.yaml", photos, three_photos, model)

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        values = [float(row["value"]) for row in log if row["name"].endswith("/objective")]
        return values[-1] < self.max_objective_ratio * values[0]

    def example(self) -> tuple[torch.Tensor, ...]:
        return torch.rand(1, 3, 64, 68), torch.tensor([[0.3, 0.7]])
