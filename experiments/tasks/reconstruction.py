"""Reconstruction with autoencoders and latent variable models: PIL baseline and inference benchmark."""

from typing import Any

import torch
from torch import Tensor

from datamodules.reconstruction import Reconstruction
from experiments.bench.timing import median_seconds
from experiments.tasks import generation
from experiments.tasks.task import Task
from modules.networks.mlp_conv import to_hw
from modules.tasks.generation import GenerativeMethod


class PilImages(generation.PilImages):
    """Images with labels, each resized with PIL, and binarized if the datamodule binarizes dynamically."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        data: Any = self.data
        return {**item, "image": torch.bernoulli(item["image"])} if data.binarization == "dynamic" else item


def bench_inference(method: Any, data: Reconstruction) -> dict[str, Any]:
    """Return "samples_per_second" of a generative method, otherwise "reconstructions_per_second" in batches of 100."""
    if isinstance(method, GenerativeMethod):
        return generation.bench_inference(method, data)
    images = torch.rand(100, method.hparams["channels"], *to_hw(method.hparams["size"]), device=method.device)
    return {"reconstructions_per_second": len(images) / median_seconds(lambda: method(images), method.device)}


TASK = Task(Reconstruction, PilImages, bench_inference)
