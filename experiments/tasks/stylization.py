"""Style transfer: inputs of `predict`, PIL baseline and inference benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from callbacks.writers.image_writer import ImageWriter
from datamodules.io.image_refs import list_image_refs
from datamodules.io.user_images import PhotographInputs
from datamodules.stylization import Stylization
from experiments.bench.timing import median_seconds
from experiments.tasks.pil import to_tensor
from experiments.tasks.task import Task
from modules.tasks.stylization import StylizationMethod


def predict(cli: Any, files: Sequence[Path], paths: dict[str, Path], output: Path) -> tuple[PhotographInputs, ImageWriter]:
    """Set the style, and return a dataset of photographs and a writer of stylized photographs."""
    cli.model.select(cli.config.style, 1.0 if cli.config.alpha is None else cli.config.alpha)
    return PhotographInputs(files, cli.model.min_side), ImageWriter(paths)


class PilCrops(Dataset[dict[str, Tensor]]):
    """Random crops of photographs, which each item reads, resizes, crops and randomly flips with PIL."""

    def __init__(self, data: Stylization) -> None:
        self.data, self.files = data, [ref.path for ref in list_image_refs(data.train)]

    def __len__(self) -> int:
        return 100 * len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = Image.open(self.files[index % len(self.files)]).convert("RGB")
        factor = self.data.resize / min(image.size)
        size = [max(self.data.resize, round(length * factor)) for length in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        left, top = (int(torch.randint(length - self.data.size + 1, ())) for length in image.size)
        image = image.crop((left, top, left + self.data.size, top + self.data.size))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"image": to_tensor(image)}


def bench_inference(method: StylizationMethod, data: Stylization) -> dict[str, Any]:
    """Return the megapixels stylized per second, on one photograph of the training size."""
    image, mixture = torch.rand(1, 3, data.size, data.size), method.mixture_of(torch.zeros(1, dtype=torch.long))
    return {"megapixels_per_second": data.size**2 / 1e6 / median_seconds(lambda: method.stylize(image, mixture))}


TASK = Task(Stylization, PilCrops, bench_inference, predict, ("style", "alpha"))
