"""Reconstruction: a small recipe, and the part of the contract that depends on the task."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from datamodules.reconstruction import Reconstruction
from tests.helpers.method_contract import Contract
from tests.helpers.tiny_recipes import Model, write_yaml


def write_reconstruction_recipe(path: Path, model: Model, metrics: list[Model] | None = None, **data: Any) -> Path:
    """Write a reconstruction recipe on the embedded digits; the default metric is the likelihood."""
    init_args = {
        "train": "digits/train",
        "size": 28,
        "val": "digits/val",
        "test": ["digits/test"],
        "binarization": "dynamic",
        "batch_size": 4,
        **data,
    }
    data = {"class_path": "datamodules.reconstruction.Reconstruction", "init_args": init_args}
    likelihood = {"class_path": "callbacks.metrics.likelihood.Likelihood", "init_args": {"n_samples": 3}}
    if metrics is not None:
        return write_yaml(path, model, data, metrics)
    return write_yaml(path, model, data, [likelihood], "digits-val/elbo/bernoulli-dynamic")


def of_digits(**settings) -> Reconstruction:
    """Return the datamodule of the embedded digits, set up for training."""
    data = Reconstruction(**{"train": "digits/train", "size": 28, "val": "digits/val", "test": ["digits/test"], **settings})
    data.setup("fit")
    return data


class ReconstructionContract(Contract):
    min_score: ClassVar[float]  # ELBO in nats per digit

    @pytest.fixture
    def recipe(self, workdir: Path) -> Path:
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_reconstruction_recipe(workdir / "tiny.yaml", model)

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        return [float(row["value"]) for row in log if "/elbo/" in row["name"]][-1] > self.min_score

    def example(self) -> torch.Tensor:
        return torch.rand(2, 1, 28, 28)
