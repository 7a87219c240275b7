"""Recipes of 15 steps with batch size 4 and a validation every 5 steps, on small real images."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

Model = dict[str, Any]


def write_yaml(
    path: Path, model: Model, data: Model, callbacks: list[Model], monitor: str | None = None, waits_for_device: bool = False
) -> Path:
    names = ["SignalAt", "RanksAgree", "ListensOnLoopback", *([] if waits_for_device else ["NoSynchronization"])]
    probes = [{"class_path": f"tests.helpers.probe_callbacks.{name}"} for name in names]
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
