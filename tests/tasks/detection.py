"""Detection: a small recipe, and the part of the contract that depends on the task."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.helpers.method_contract import Contract
from tests.helpers.tiny_recipes import Model, write_yaml

SMALL_NETWORK = {
    "num_classes": 2,
    "backbone": "small",
    "base_channels": 8,
    "fpn_channels": 16,
    "box_channels": 16,
    "mask_layers": 1,
    "mask_channels": 8,
    "anchor_sizes": [16, 32, 48, 64, 96],
    "anchors_per_image": 32,
    "rois_per_image": 16,
    "train_proposals": 50,
    "test_proposals": 50,
    "min_size": None,
}


def write_detection_recipe(path: Path, model: Model, **data: Any) -> Path:
    """Write a detection recipe on the embedded image of coins."""
    init_args = {
        "train": "coins/train",
        "val": "coins/val",
        "test": ["coins/train", "coins/val"],
        "num_classes": 2,
        "crop": 96,
        "zoom": 1.3,
        "symmetries": True,
        "batch_size": 4,
        **data,
    }
    data = {"class_path": "datamodules.detection.Detection", "init_args": init_args}
    metrics = [{"class_path": "callbacks.metrics.coco_ap.COCOAveragePrecision"}]
    return write_yaml(path, model, data, metrics, "coins-val/box/ap", waits_for_device=True)


class DetectionContract(Contract):
    """The training of the networks starts from random weights."""

    synchronizes = "torchvision's samplers of RoIs and its suppression of boxes have results whose sizes depend on the data"
    min_score: ClassVar[float]  # box AP on the coins, in percent

    @pytest.fixture
    def recipe(self, workdir: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_detection_recipe(workdir / "tiny.yaml", model)

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        return max(float(row["value"]) for row in log if row["name"] == "coins-val/box/ap") > self.min_score

    def example(self) -> torch.Tensor:
        return torch.rand(1, 3, 64, 64)
