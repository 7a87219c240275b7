"""Datasets that load item by item through PIL in worker processes: the common practice that `bench` compares with."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import map_coordinates, zoom
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.catalog.catalog import resolve_images
from datamodules.catalog.domains import load_domains
from datamodules.catalog.masked_images import list_masked_images
from datamodules.generation import Generation
from datamodules.reconstruction import Reconstruction
from datamodules.segmentation import Segmentation
from datamodules.superresolution import SuperResolution
from datamodules.unpaired import Unpaired
from modules.training.phases import Batch


def pil_batches(data: Any, device: torch.device) -> Iterator[Batch]:
    """Yield endless batches for a data module's task, with one worker per CPU core."""
    dataset_classes: dict[type, Any] = {
        SuperResolution: PilPatches,
        Generation: PilImages,
        Reconstruction: PilImages,
        Segmentation: PilTiles,
        Unpaired: PilPairs,
    }
    dataset: Dataset[Any] = dataset_classes[type(data)](data)
    loader = DataLoader(
        dataset, data.batch_size, shuffle=True, drop_last=True, num_workers=os.cpu_count() or 1, persistent_workers=True
    )
    while True:
        for batch in loader:
            yield {key: value.to(device) for key, value in batch.items()}


class PilPatches(Dataset[dict[str, Tensor]]):
    """Pairs of low- and high-resolution patches; each item opens an image file."""

    def __init__(self, data: SuperResolution) -> None:
        self.files, self.scale = resolve_images(data.train, data.scale), data.scale
        self.size = data.scale * data.patch_size

    def __len__(self) -> int:
        return 100 * len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = Image.open(self.files[index % len(self.files)]).convert("YCbCr").getchannel(0)
        left, top = (int(torch.randint(max(1, length - self.size + 1), ())) for length in image.size)
        high = image.crop((left, top, left + self.size, top + self.size))
        low = high.resize((self.size // self.scale,) * 2, Image.Resampling.BICUBIC)
        return {"input": to_tensor(low), "target": to_tensor(high)}


class PilImages(Dataset[dict[str, Tensor]]):
    """Images with labels, resized by PIL one at a time."""

    def __init__(self, data: Generation) -> None:
        self.data, self.items = data, data.items

    def __len__(self) -> int:
        return max(len(self.items), self.data.batch_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.items[0, np.array([index % len(self.items)])]
        image = Image.fromarray(sample["image"][0].permute(1, 2, 0).numpy().squeeze())
        image = image.resize((self.data.size,) * 2, Image.Resampling.BILINEAR)
        pixels = to_tensor(image)
        if isinstance(self.data, Reconstruction) and self.data.binarization == "dynamic":
            pixels = torch.bernoulli(pixels)
        return {"image": pixels, "label": sample["label"][0]}


class PilTiles(Dataset[dict[str, Tensor]]):
    """Tiles with masks: PIL opens both files, scipy rotates and deforms them."""

    def __init__(self, data: Segmentation) -> None:
        self.data, self.images = data, list_masked_images(data.train, data.instances)

    def __len__(self) -> int:
        return 100 * len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        data, generator = self.data, np.random.default_rng(int(torch.randint(2**31, ())))
        pixels, mask = self.images[index % len(self.images)].read(data.channels, data.downscale)
        side = data.crop + data.margin
        offsets = np.stack(np.meshgrid(*[np.arange(side) - (side - 1) / 2] * 2, indexing="ij"))
        angle = generator.uniform(0, 2 * np.pi) * data.augment.rotate
        grid = np.tensordot([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], offsets, 1)
        grid += np.array([generator.uniform(0, length) for length in mask.shape])[:, None, None]
        if data.augment.elastic_std:
            coarse = generator.normal(0, data.augment.elastic_std, (2, 3, 3))
            grid += np.stack([zoom(field, side / 3, order=3)[:side, :side] for field in coarse])
        image = np.stack([map_coordinates(channel, grid, order=1, mode="mirror") for channel in pixels.numpy()])
        half = data.margin // 2
        inner = grid[:, half : half + data.crop, half : half + data.crop]
        sample = {
            "image": torch.from_numpy(image).float() / 255,
            "mask": torch.from_numpy(map_coordinates(np.minimum(mask, data.classes - 1), inner, order=0, mode="mirror")).long(),
        }
        return sample if data.border_weight is None else {**sample, "weight": torch.ones(data.crop, data.crop)}


class PilPairs(Dataset[dict[str, Tensor]]):
    """Random images of domains A and B, each opened, resized, cropped and randomly flipped per item."""

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


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a PIL image of mode L or RGB to a float32 tensor (C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).float().div(255)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
