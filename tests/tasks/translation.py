"""Translation: a small recipe, and the part of the contract that depends on the task."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.method_contract import Contract
from tests.helpers.tiny_recipes import Model, write_yaml


def write_translation_recipe(path: Path, model: Model, **data: Any) -> Path:
    """Write a recipe for translation between textures, grass and gravel."""
    init_args = {
        "train": "textures/grass2gravel/train",
        "val": "textures/grass2gravel/test",
        "test": ["textures/grass2gravel/test"],
        "crop": 32,
        "resize": None,
        "batch_size": 4,
        **data,
    }
    data = {"class_path": "datamodules.unpaired.Unpaired", "init_args": init_args}
    return write_yaml(path, model, data, [{"class_path": "callbacks.metrics.cycle_l1.CycleL1"}])


class TranslationContract(Contract):
    @pytest.fixture
    def recipe(self, workdir: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_translation_recipe(workdir / "tiny.yaml", model)

    def example(self) -> torch.Tensor:
        return torch.rand(1, 3, 24, 32)
