"""Segmentation: a small recipe, and the part of the contract that depends on the task."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.helpers.method_contract import Contract
from tests.helpers.tiny_recipes import Model, write_yaml


def write_segmentation_recipe(path: Path, model: Model, **data: Any) -> Path:
    """Write a segmentation recipe on the embedded image of coins."""
    init_args = {
        "train": "coins/train",
        "val": "coins/val",
        "test": ["coins/train", "coins/val"],
        "num_classes": 2,
        "channels": 1,
        "rotate": True,
        "elastic_std": 3.0,
        "contrast_jitter": 0.2,
        "border_weight": 10.0,
        "batch_size": 4,
        **data,
    }
    data = {"class_path": "datamodules.segmentation.Segmentation", "init_args": init_args}
    metrics = [
        {"class_path": "callbacks.metrics.segmentation.SegmentationMetrics"},
        {"class_path": "callbacks.metrics.seg_ctc.CTCSeg"},
    ]
    return write_yaml(path, model, data, metrics, "coins-val/miou/pooled")


class SegmentationContract(Contract):
    """Subclasses also set `samples`, the arguments of the datamodule for the network's crops."""

    samples: ClassVar[dict[str, int]]
    min_score: ClassVar[float]  # mean IoU on the coins

    @pytest.fixture
    def recipe(self, workdir: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_segmentation_recipe(workdir / "tiny.yaml", model, **self.samples)

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        return max(float(row["value"]) for row in log if row["name"] == "coins-val/miou/pooled") > self.min_score

    def example(self) -> torch.Tensor:
        side = self.samples["crop"] + self.samples["margin"]
        return torch.rand(1, 1, side, side)
