"""Unpaired image translation: inputs of `predict`, PIL baseline and inference benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from callbacks.writers.image_writer import ImageWriter
from datamodules.catalog.domains import load_domains
from datamodules.io.user_images import TranslationInputs
from datamodules.unpaired import Unpaired
from experiments.bench.cyclegan_baseline import ratio_to_classic
from experiments.bench.reference_loop import bare_batches
from experiments.bench.timing import median_seconds
from experiments.tasks.pil import to_tensor
from experiments.tasks.task import Task
from modules.cyclegan import CycleGAN
from modules.tasks.translation import TranslationMethod


def predict(cli: Any, files: Sequence[Path], paths: dict[str, Path], output: Path) -> tuple[TranslationInputs, ImageWriter]:
    """Return a dataset of images at the datamodule's size, and a writer of translated images."""
    short_side = None if cli.datamodule.resize is None else cli.datamodule.crop
    return TranslationInputs(files, short_side, cli.config.direction or "AtoB"), ImageWriter(paths)


class PilPairs(Dataset[dict[str, Tensor]]):
    """Random pairs of images of domains A and B, which each item reads, resizes, crops and randomly flips with PIL."""

    def __init__(self, data: Unpaired) -> None:
        self.data, self.domains = data, dict(zip("AB", load_domains(data.train), strict=True))

    def __len__(self) -> int:
        return 100 * max(len(images) for images in self.domains.values())

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = {}
        for name, images in self.domains.items():
            domain_image = images[int(torch.randint(len(images), ()))]
            image = Image.fromarray(domain_image.pixels().permute(1, 2, 0).numpy())
            if self.data.resize is not None:
                image = image.resize((self.data.resize,) * 2, Image.Resampling.BICUBIC)
            left, top = (int(torch.randint(length - self.data.crop + 1, ())) for length in image.size)
            image = image.crop((left, top, left + self.data.crop, top + self.data.crop))
            if self.data.hflip and torch.rand(()) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            sample[name] = to_tensor(image)
        return sample


def bench_inference(method: TranslationMethod, data: Unpaired) -> dict[str, Any]:
    """Return "translations_per_second"; for CycleGAN, also the time of the authors' training step divided by ours."""
    batch = next(bare_batches(data, method))
    seconds = median_seconds(lambda: method.translate(batch["A"], "AtoB"), method.device)
    results = {"translations_per_second": len(batch["A"]) / seconds}
    return {**results, **ratio_to_classic(method, batch)} if isinstance(method, CycleGAN) and method.adversarial else results


TASK = Task(Unpaired, PilPairs, bench_inference, predict, ("direction",))
