"""Super-resolution: a small recipe, and the part of the contract that depends on the task."""

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.helpers.method_contract import Contract
from tests.helpers.tiny_recipes import Model, write_yaml


def write_recipe(path: Path, photos: Path, model: Model, **data: Any) -> Path:
    """Write a super-resolution recipe on a folder of images."""
    scale = model["init_args"].get("scale", 3)
    init_args = {
        "scale": scale,
        "train": str(photos),
        "val_every_nth": 4,
        "batch_size": 4,
        "patch_size": 17,
        "border_overhang": 4,
        **data,
    }
    data = {"class_path": "datamodules.superresolution.SuperResolution", "init_args": init_args}
    metric = {"class_path": "callbacks.metrics.psnr_ssim.PSNRSSIM", "init_args": {"crop_border": scale}}
    return write_yaml(path, model, data, [metric], f"{photos.name}-holdout/psnr-y/crop{scale}")


class SuperResolutionContract(Contract):
    min_psnr_gain_db: ClassVar[float]  # gain over the first validation
    data: ClassVar[dict[str, Any]] = {}  # arguments of the datamodule

    @pytest.fixture
    def recipe(self, workdir: Path, photos: Path, three_photos: Path) -> Path:
        module, _, name = self.model["class_path"].rpartition(".")
        has_warmup = "warmup" in signature(getattr(import_module(module), name)).parameters
        small = {"total_images": 60, **({"warmup": 8} if has_warmup else {})}
        model = {**self.model, "init_args": {**self.model["init_args"], **small}}
        return write_recipe(workdir / "tiny.yaml", photos, model, test=[str(three_photos)], **self.data)

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        psnr_values = [float(row["value"]) for row in log if "-holdout/psnr" in row["name"]]
        return psnr_values[-1] > psnr_values[0] + self.min_psnr_gain_db

    def example(self) -> torch.Tensor:
        return torch.rand(1, 1, 19, 23)
