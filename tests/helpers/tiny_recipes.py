"""Recipes of 15 steps with a batch of 4 and a validation every 5, on small real pictures."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from datamodules.reconstruction import Reconstruction

Model = dict[str, Any]


def write_recipe(path: Path, photos: Path, model: Model, **data: Any) -> Path:
    """For a method that enlarges pictures, on a folder of them."""
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
    quality = {"class_path": "callbacks.metrics.psnr_ssim.PSNRSSIM", "init_args": {"crop_border": scale}}
    return _write(path, model, data, [quality], f"{photos.name}-holdout/psnr-y/crop{scale}")


def write_generative_recipe(path: Path, model: Model, **data: Any) -> Path:
    """For a method that makes grey 28 x 28 images from noise, on the embedded digits."""
    projection = path.with_name("projection.pth")
    torch.save(torch.randn(784, 24, generator=torch.Generator().manual_seed(0)) / 28, projection)
    init_args = {
        "train": "digits/train",
        "size": 28,
        "channels": 1,
        "val": "digits/val",
        "test": ["digits/test"],
        "val_samples": 230,
        "test_samples": 230,
        "batch_size": 4,
        **data,
    }
    data = {"class_path": "datamodules.generation.Generation", "init_args": init_args}
    quality = {
        "class_path": "callbacks.metrics.feature_metrics.FeatureMetrics",
        "init_args": {
            "metrics": ["fid", "fid-split-half"],
            "extractor": "tests.helpers.tiny_recipes.Projection",
            "weights": str(projection),
            "on_validation": True,
        },
    }
    return _write(path, model, data, [quality])


def write_segmentation_recipe(path: Path, model: Model, **data: Any) -> Path:
    """For a method that tells coins from the ground."""
    init_args = {
        "train": "coins/train",
        "val": "coins/val",
        "test": ["coins/train", "coins/val"],
        "classes": 2,
        "channels": 1,
        "rotate": True,
        "elastic_std": 3.0,
        "contrast_jitter": 0.2,
        "border_weight": 10.0,
        "batch_size": 4,
        **data,
    }
    data = {"class_path": "datamodules.segmentation.Segmentation", "init_args": init_args}
    measures = [
        {"class_path": "callbacks.metrics.segmentation.SegmentationMetrics"},
        {"class_path": "callbacks.metrics.seg_ctc.CTCSeg"},
    ]
    return _write(path, model, data, measures, "coins-val/miou/pooled")


def write_translation_recipe(path: Path, model: Model, **data: Any) -> Path:
    """For a method that turns grass into gravel and back."""
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
    return _write(path, model, data, [{"class_path": "callbacks.metrics.cycle_l1.CycleL1"}])


def write_reconstruction_recipe(path: Path, model: Model, measures: list[Model] | None = None, **data: Any) -> Path:
    """For a method that gives grey 28 x 28 images back, on the embedded digits; without measures, its likelihood is."""
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
    if measures is not None:
        return _write(path, model, data, measures)
    return _write(path, model, data, [likelihood], "digits-val/elbo/bernoulli-dynamic")


def _write(path: Path, model: Model, data: Model, callbacks: list[Model], monitor: str | None = None) -> Path:
    watching = [{"class_path": f"tests.helpers.probe_callbacks.{name}"} for name in ("SignalAt", "RanksAgree")]
    recipe = {
        "model": model,
        "data": data,
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 1, "callbacks": [*callbacks, *watching]},
        "monitor": monitor,
        "val_every_images": 20,
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


class Projection:
    """Features for tests: 24 random projections of a 28 x 28 image."""

    name = "projection"
    url = None

    def __init__(self, weights: Path) -> None:
        self.matrix = torch.load(weights, weights_only=True)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": images.flatten(1).float() / 255 @ self.matrix}


def random_weights(network: nn.Module) -> dict[str, Tensor]:
    """Values of a scale that keeps the signal alive through the layers, so that images are told apart."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in network.state_dict().items():
        if name.endswith("running_var") or (value.ndim == 1 and name.endswith("bn.weight")):
            weights[name] = torch.ones_like(value)
        elif value.ndim > 1:
            weights[name] = torch.randn(value.shape, generator=generator) * math.sqrt(2 / value[0].numel())
        else:
            weights[name] = torch.zeros_like(value)
    return weights


def inception_weights() -> dict[str, Tensor]:
    """Random ones for torch-fidelity's Inception."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **named: {})
        return random_weights(FeatureExtractorInceptionV3("inception", ["64"], feature_extractor_weights_path="none"))


def of_digits(**settings) -> Reconstruction:
    """Embedded digits, read for training."""
    data = Reconstruction(**{"train": "digits/train", "size": 28, "val": "digits/val", "test": ["digits/test"], **settings})
    data.setup("fit")
    return data
