"""Recipes of 15 steps with batch size 4 and a validation every 5 steps, on small real images."""

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
    return _write(path, model, data, [metric], f"{photos.name}-holdout/psnr-y/crop{scale}")


def write_generative_recipe(path: Path, model: Model, **data: Any) -> Path:
    """Write a recipe for generation of gray 28 x 28 images, on the embedded digits."""
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
    metric = {
        "class_path": "callbacks.metrics.fid_kid_is.FeatureMetrics",
        "init_args": {
            "metrics": ["fid", "fid-split-half"],
            "extractor": "tests.helpers.tiny_recipes.Projection",
            "weights": str(projection),
            "on_validation": True,
        },
    }
    return _write(path, model, data, [metric])


def write_segmentation_recipe(path: Path, model: Model, **data: Any) -> Path:
    """Write a segmentation recipe on the embedded image of coins."""
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
    metrics = [
        {"class_path": "callbacks.metrics.segmentation.SegmentationMetrics"},
        {"class_path": "callbacks.metrics.seg_ctc.CTCSeg"},
    ]
    return _write(path, model, data, metrics, "coins-val/miou/pooled")


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
    return _write(path, model, data, [{"class_path": "callbacks.metrics.cycle_l1.CycleL1"}])


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
        return _write(path, model, data, metrics)
    return _write(path, model, data, [likelihood], "digits-val/elbo/bernoulli-dynamic")


def _write(path: Path, model: Model, data: Model, callbacks: list[Model], monitor: str | None = None) -> Path:
    probes = [{"class_path": f"tests.helpers.probe_callbacks.{name}"} for name in ("SignalAt", "RanksAgree")]
    recipe = {
        "model": model,
        "data": data,
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 1, "callbacks": [*callbacks, *probes]},
        "monitor": monitor,
        "val_every_images": 20,
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


class Projection:
    """Feature extractor for tests: 24 random projections of a 28 x 28 image."""

    name = "projection"
    url = None

    def __init__(self, weights: Path) -> None:
        self.matrix = torch.load(weights, weights_only=True)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": images.flatten(1).float() / 255 @ self.matrix}


def random_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return random weights with He initialization, so that features of different images differ."""
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
    """Return random weights for torch-fidelity's Inception."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        return random_weights(FeatureExtractorInceptionV3("inception", ["64"], feature_extractor_weights_path="none"))


def of_digits(**settings) -> Reconstruction:
    """Return the datamodule of the embedded digits, set up for training."""
    data = Reconstruction(**{"train": "digits/train", "size": 28, "val": "digits/val", "test": ["digits/test"], **settings})
    data.setup("fit")
    return data
