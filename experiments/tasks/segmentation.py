"""Segmentation: inputs of `predict`, PIL baseline and inference benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import map_coordinates, zoom
from torch import Tensor
from torch.utils.data import Dataset

from callbacks.writers.mask_writer import MaskWriter
from datamodules.io.user_images import SegmentationInputs
from datamodules.segmentation import Segmentation
from datamodules.segmentation_datasets import InMemoryTiles
from experiments.bench.timing import median_seconds
from experiments.tasks.task import Task
from modules.tasks.segmentation import SegmentationMethod


def predict(cli: Any, files: Sequence[Path], paths: dict[str, Path], output: Path) -> tuple[SegmentationInputs, MaskWriter]:
    """Return a dataset of the images, reduced as in the datamodule, and a writer of masks and overlays."""
    data = cli.datamodule
    inputs = SegmentationInputs(files, data.channels, data.downscale, data.value_range)
    return inputs, MaskWriter(paths, output, data.class_names, data.class_colors)


class PilTiles(Dataset[dict[str, Tensor]]):
    """Tiles with masks: PIL reads image and mask, SciPy flips, rotates, zooms and deforms them; weights are in memory."""

    def __init__(self, data: Segmentation) -> None:
        self.data, self.images = data, data.list_training_images()
        maps = data.tiles.weights if isinstance(data.tiles, InMemoryTiles) else None
        self.weights = None if maps is None else [maps.image(i)[0].numpy() for i in range(len(maps))]

    def __len__(self) -> int:
        return 100 * len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        data, generator = self.data, np.random.default_rng(int(torch.randint(2**31, ())))
        pixels, mask = self.images[index % len(self.images)].read(data.channels, data.downscale)
        side = data.crop + data.margin
        offsets = np.stack(np.meshgrid(*[np.arange(side) - (side - 1) / 2] * 2, indexing="ij"))
        angle = generator.uniform(0, 2 * np.pi) * data.augment.rotate
        offsets[1] *= generator.choice([-1, 1]) if data.augment.hflip else 1
        offsets /= data.augment.zoom ** generator.uniform(-1, 1)
        grid = np.tensordot([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], offsets, 1)
        grid += np.array([generator.uniform(0, length) for length in mask.shape])[:, None, None]
        if data.augment.elastic_std:
            coarse = generator.normal(0, data.augment.elastic_std, (2, 3, 3))
            grid += np.stack([zoom(field, side / 3, order=3)[:side, :side] for field in coarse])
        image = np.stack([map_coordinates(channel, grid, order=1, mode="mirror") for channel in pixels.numpy()])
        half = data.margin // 2
        inner = grid[:, half : half + data.crop, half : half + data.crop]
        last = data.num_classes - 1
        gain, shift = data.contrast_jitter * generator.uniform(-1, 1, 2)
        values = torch.from_numpy(image).float() / 255
        sample = {
            "image": ((values - values.mean()) * (1 + gain) + values.mean() + shift).clamp(0, 1),
            "mask": torch.from_numpy(map_coordinates(np.minimum(mask, last), inner, order=0, mode="mirror")).long(),
        }
        if self.weights is not None:
            weight = map_coordinates(self.weights[index % len(self.images)], inner, order=1, mode="mirror")
            sample["weight"] = torch.from_numpy(weight)
        return sample


def bench_inference(method: SegmentationMethod, data: Segmentation) -> dict[str, Any]:
    """Return "megapixels_per_second" on up to five validation images, without test-time augmentation."""
    method.tta_views = 1
    data.setup("validate")
    images = [data.val_images[i]["image"].to(method.device).float() / 255 for i in range(min(5, len(data.val_images)))]
    pixels = sum(image.shape[-1] * image.shape[-2] for image in images)
    seconds = median_seconds(lambda: [method.predict_step({"image": image}, 0) for image in images], method.device)
    return {"megapixels_per_second": pixels / seconds / 1e6}


TASK = Task(Segmentation, PilTiles, bench_inference, predict, reads_stacks=True)
