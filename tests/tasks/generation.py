"""Generation: a small recipe, and the part of the contract that depends on the task."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.method_contract import Contract, instantiate
from tests.helpers.tiny_recipes import Model, write_yaml


def write_generative_recipe(path: Path, model: Model, **data: Any) -> Path:
    """Write a recipe for generation of gray images, of 28 x 28 pixels or `size`, on the embedded digits."""
    projection = path.with_name("projection.pth")
    size = data.setdefault("size", 28)
    torch.save(torch.randn(size**2, 24, generator=torch.Generator().manual_seed(0)) / size, projection)
    init_args = {
        "train": "digits/train",
        "channels": 1,
        "val": "digits/val",
        "test": ["digits/test"],
        "val_samples": 230,
        "test_samples": 230,
        "batch_size": 4,
        **data,
    }
    data = {"class_path": "datamodules.generation.Generation", "init_args": init_args}
    metric = {
        "class_path": "callbacks.metrics.fid_kid_is.FeatureMetrics",
        "init_args": {
            "metrics": ["fid", "fid-split-half"],
            "extractor": "tests.helpers.tiny_recipes.Projection",
            "weights": str(projection),
            "on_validation": True,
        },
    }
    return write_yaml(path, model, data, [metric])


class GenerativeContract(Contract):
    size = 28
    max_fid = 1.2  # untrained: 5.2 or more; 500 black images: 2.5; 500 times the mean digit: 1.7

    @pytest.fixture
    def recipe(self, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_generative_recipe(workdir / "tiny.yaml", model, size=self.size)

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        return [float(row["value"]) for row in log if "/fid/" in row["name"]][-1] < self.max_fid

    def example(self) -> torch.Tensor:
        return instantiate(self.model).sample_latents(range(3))
