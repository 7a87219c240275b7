"""Generation: PIL baseline and inference benchmark."""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.generation import Generation
from experiments.bench.timing import median_seconds
from experiments.tasks.pil import to_tensor
from experiments.tasks.task import Task
from modules.tasks.generation import GenerativeMethod


class PilImages(Dataset[dict[str, Tensor]]):
    """Images with labels, each resized with PIL."""

    def __init__(self, data: Generation) -> None:
        self.data, self.items, self.start = data, data.items, data.position()
        self.side = data.image_size_at(self.start) or data.size

    def __len__(self) -> int:
        return max(len(self.items), self.data.batch_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.items[self.start, np.array([index % len(self.items)])]
        image = Image.fromarray(sample["image"][0].permute(1, 2, 0).numpy().squeeze())
        image = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        return {"image": to_tensor(image), "label": sample["label"][0]}


def bench_inference(method: GenerativeMethod, data: Generation) -> dict[str, Any]:
    """Return "samples_per_second", the images generated per second in batches of 64."""
    latents = method.sample_latents(range(64))
    return {"samples_per_second": 64 / median_seconds(lambda: method.sample(latents))}


TASK = Task(Generation, PilImages, bench_inference)
