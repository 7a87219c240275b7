"""Generation: PIL baseline and inference benchmark."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.generation import Generation
from experiments.bench.timing import median_seconds
from experiments.tasks.pil import to_tensor
from experiments.tasks.task import Task
from modules.tasks.generation import GenerativeMethod


class PilImages(Dataset[dict[str, Tensor]]):
    """Images with labels, each resized and randomly flipped with PIL."""

    def __init__(self, data: Generation) -> None:
        self.data, self.items = data, data.items
        self.side = data.image_size_at(data.position()) or data.size

    def __len__(self) -> int:
        return max(len(self.items), self.data.batch_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = index % len(self.items)
        pixels = self.items.read(np.array([item]), self.items.size)[0]
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy().squeeze())
        image = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        if self.data.hflip and torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"image": to_tensor(image), "label": self.items.labels[item]}


def bench_inference(method: GenerativeMethod, data: Generation) -> dict[str, Any]:
    """Return "samples_per_second", the images generated per second in batches of 64."""
    latents = method.sample_latents(range(64))
    return {"samples_per_second": 64 / median_seconds(lambda: method.sample(latents), method.device)}


TASK = Task(Generation, PilImages, bench_inference)
