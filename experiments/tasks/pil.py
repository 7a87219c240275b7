"""Datasets that load single items with PIL: the common practice, used as the baseline of `darkroom bench`."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.catalog.array_readers import read_split
from datamodules.io.image_io import to_channels
from datamodules.io.image_refs import list_image_refs
from datamodules.photographs import Photographs, is_array_dataset


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a PIL image of mode L or RGB to a float32 tensor (C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).float().div(255)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


class PilCrops(Dataset[dict[str, Tensor]]):
    """Random crops of labeled photographs, which each item reads, resizes, crops and randomly flips with PIL."""

    def __init__(self, data: Photographs) -> None:
        self.data = data
        self.sources: list[Path] | Tensor
        if is_array_dataset(data.train):
            self.sources, self.labels = read_split(data.train)
        else:
            refs = list_image_refs(data.train)
            self.sources, self.labels = [ref.path for ref in refs], data.file_labels(refs)

    def __len__(self) -> int:
        return 100 * len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source = self.sources[index % len(self.sources)]
        if isinstance(source, Tensor):
            image = Image.fromarray(to_channels(source, 3).permute(1, 2, 0).numpy())
        else:
            image = Image.open(source).convert("RGB")
        factor = self.data.resize / min(image.size)
        size = [max(self.data.resize, round(length * factor)) for length in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        left, top = (int(torch.randint(length - self.data.size + 1, ())) for length in image.size)
        image = image.crop((left, top, left + self.data.size, top + self.data.size))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"image": to_tensor(image), "label": self.labels[index % len(self.sources)]}
