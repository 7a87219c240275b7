"""Batches as most repositories make them: item by item, through PIL, by worker processes; for `bench` to compare with."""

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
    """Endless batches of a datamodule's task; a worker a core."""
    kinds: dict[type, Any] = {
        SuperResolution: PilPatches,
        Generation: PilImages,
        Reconstruction: PilImages,
        Segmentation: PilTiles,
        Unpaired: PilPairs,
    }
    items: Dataset[Any] = kinds[type(data)](data)
    loader = DataLoader(
        items, data.batch_size, shuffle=True, drop_last=True, num_workers=os.cpu_count() or 1, persistent_workers=True
    )
    while True:
        for batch in loader:
            yield {key: value.to(device) for key, value in batch.items()}


class PilPatches(Dataset[dict[str, Tensor]]):
    """A pair of patches an item, cut from a file opened for it."""

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
    """An image an item, through PIL and torchvision's transforms."""

    def __init__(self, data: Generation) -> None:
        self.data, self.items = data, data.items

    def __len__(self) -> int:
        return max(len(self.items), self.data.batch_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        found = self.items[0, np.array([index % len(self.items)])]
        image = Image.fromarray(found["image"][0].permute(1, 2, 0).numpy().squeeze())
        image = image.resize((self.data.size,) * 2, Image.Resampling.BILINEAR)
        pixels = to_tensor(image)
        if isinstance(self.data, Reconstruction) and self.data.binarization == "dynamic":
            pixels = torch.bernoulli(pixels)
        return {"image": pixels, "label": found["label"][0]}


class PilTiles(Dataset[dict[str, Tensor]]):
    """A tile an item: PIL opens picture and mask, scipy turns and deforms them."""

    def __init__(self, data: Segmentation) -> None:
        self.data, self.pictures = data, list_masked_images(data.train, data.instances)

    def __len__(self) -> int:
        return 100 * len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        data, generator = self.data, np.random.default_rng(int(torch.randint(2**31, ())))
        pixels, mask = self.pictures[index % len(self.pictures)].read(data.channels, data.downscale)
        side = data.crop + data.margin
        steps = np.stack(np.meshgrid(*[np.arange(side) - (side - 1) / 2] * 2, indexing="ij"))
        angle = generator.uniform(0, 2 * np.pi) * data.augment.rotate
        places = np.tensordot([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], steps, 1)
        places += np.array([generator.uniform(0, length) for length in mask.shape])[:, None, None]
        if data.augment.elastic_std:
            coarse = generator.normal(0, data.augment.elastic_std, (2, 3, 3))
            places += np.stack([zoom(field, side / 3, order=3)[:side, :side] for field in coarse])
        image = np.stack([map_coordinates(channel, places, order=1, mode="mirror") for channel in pixels.numpy()])
        half = data.margin // 2
        inner = places[:, half : half + data.crop, half : half + data.crop]
        found = {
            "image": torch.from_numpy(image).float() / 255,
            "mask": torch.from_numpy(map_coordinates(np.minimum(mask, data.classes - 1), inner, order=0, mode="mirror")).long(),
        }
        return found if data.border_weight is None else {**found, "weight": torch.ones(data.crop, data.crop)}


class PilPairs(Dataset[dict[str, Tensor]]):
    """Any picture of A and any of B an item, each opened, resized, cut and mirrored for it."""

    def __init__(self, data: Unpaired) -> None:
        self.data, self.load_domains = data, dict(zip("AB", load_domains(data.train), strict=True))

    def __len__(self) -> int:
        return 100 * max(len(members) for members in self.load_domains.values())

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        found = {}
        for name, members in self.load_domains.items():
            member = members[int(torch.randint(len(members), ()))]
            image = Image.fromarray(member.pixels().permute(1, 2, 0).numpy())
            if self.data.resize is not None:
                image = image.resize((self.data.resize,) * 2, Image.Resampling.BICUBIC)
            left, top = (int(torch.randint(length - self.data.crop + 1, ())) for length in image.size)
            image = image.crop((left, top, left + self.data.crop, top + self.data.crop))
            if self.data.hflip and torch.rand(()) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            found[name] = to_tensor(image)
        return found


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL image of mode L or RGB as float32 (C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).float().div(255)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
