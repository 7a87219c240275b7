"""Reconstruction: training and evaluation images with real-valued or binarized pixels."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import GenerationBatch
from datamodules.catalog.array_readers import read_split
from datamodules.catalog.catalog import catalog, get_dataset
from datamodules.errors import UserError
from datamodules.generation import Generation, InMemoryImages, eval_batch_size
from datamodules.io.image_io import InvalidImage
from datamodules.io.image_refs import dataset_label, list_image_refs
from datamodules.io.image_set import ImageSet, folder_names
from datamodules.random.philox import random_words
from datamodules.transforms.to_device import to_device_async

Binarization = Literal["real-valued", "dynamic", "static"]


class Reconstruction(Generation):
    """Images of one size for autoencoders.

    Batches are {"image": (N, channels, size, size) float32 in [0, 1], "label": int64 (N,)}; evaluation batches also have
    "index", "name" and "dataset" of each image.

    Args:
        train: training images: a dataset of the catalog ("digits"), one of its splits ("mnist/train"), or a folder.
        size: side in pixels, see `load_image_set`; or the height and width of an array dataset, which is not resized.
        val: validation images.
        test: datasets to evaluate; absent ones are reported and skipped.
        binarization: "real-valued" for pixels in [0, 1]; "dynamic" for pixels that are sampled as 0 or 1 in each pass, with
            their values as probabilities (Burda et al., arXiv:1509.00519), and once for evaluation; "static" for binary
            datasets. Likelihoods of different kinds are not comparable and are logged under different names.
        channels: 1 or 3.
        exclude_classes: classes (folder names or digits) removed from the training set.
        crop, hflip, batch_size, num_workers, skip_bad, seed: see `Generation`.
    """

    def __init__(
        self,
        train: str,
        size: int | Sequence[int],
        val: str,
        test: Sequence[str] = (),
        binarization: Binarization = "real-valued",
        channels: int = 1,
        exclude_classes: Sequence[int | str] = (),
        crop: PositiveInt | None = None,
        hflip: bool = False,
        batch_size: int = 100,
        num_workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train,
            size if isinstance(size, int) else max(size),
            channels,
            val,
            test,
            crop=crop,
            hflip=hflip,
            batch_size=batch_size,
            num_workers=num_workers,
            skip_bad=skip_bad,
            seed=seed,
        )
        self.binarization: Binarization = binarization
        self.exclude_classes = [str(name) for name in exclude_classes]
        self.image_hw = None if isinstance(size, int) else tuple(size)
        self.class_names: list[str] = []  # class names by label

    def setup(self, stage: str) -> None:
        """Locate, read and validate the images of a stage.

        Raises:
            DatasetNotFound: a dataset is not installed.
            InvalidImage: files are unusable, or pixels do not match `binarization`; the message names them.
            UserError: `exclude_classes` contains unknown classes or all classes of the training set, or a dataset does not
                match `size` or `channels`.
        """
        super().setup(stage)
        if stage == "fit" and self.exclude_classes:
            pixels, labels = cast(InMemoryImages, self.items).images
            names = [self.class_names[label] for label in labels.unique()]
            if unknown := [name for name in self.exclude_classes if name not in names]:
                raise UserError(
                    f"data.exclude_classes: {', '.join(unknown)}: unknown classes; {self.train} has {', '.join(names)}"
                )
            keep = torch.tensor([name not in self.exclude_classes for name in self.class_names])[labels]
            if not keep.any():
                raise UserError(
                    f"data.exclude_classes: {', '.join(self.exclude_classes)}: no image of {self.train} is left. "
                    "Exclude fewer classes"
                )
            self.items = InMemoryImages(ImageSet(pixels[keep], labels[keep]))

    def _read(self, spec: str, max_images: int | None = None) -> ImageSet:
        pixels, labels = super()._read(spec, max_images) if self.image_hw is None else self._read_rectangular(spec)
        binary = bool(((pixels == 0) | (pixels == 255)).all())
        if self.binarization == "static" and not binary:
            raise InvalidImage(
                f"data.binarization: static, but {spec} has values between 0 and 255; use dynamic or real-valued"
            )
        if self.binarization != "static" and binary:
            raise InvalidImage(f"data.binarization: {self.binarization}, but {spec} is binary already; use static")
        names = [str(label) for label in labels.tolist()] if is_array_dataset(spec) else self._folder_names(spec)
        self.class_names += sorted(set(names) - set(self.class_names))
        indices = {name: i for i, name in enumerate(self.class_names)}
        return ImageSet(pixels, torch.tensor([indices[name] for name in names]))

    def _read_rectangular(self, spec: str) -> ImageSet:
        if not is_array_dataset(spec):
            raise UserError(
                f"data.size: {list(self.image_hw or ())} is for array datasets; the images of {spec} are cropped to squares. "
                "Give one number"
            )
        pixels, labels = read_split(spec)
        if tuple(pixels.shape[1:]) != (self.channels, *(self.image_hw or ())):
            raise UserError(
                f"data.size: {list(self.image_hw or ())} and data.channels: {self.channels}, but the images of {spec} are "
                f"{list(pixels.shape[1:])} (channels, height, width). Set both accordingly"
            )
        self.data_report.add_array(spec, pixels)
        return ImageSet(pixels, labels)

    def _folder_names(self, spec: str) -> list[str]:
        """Return the folder name of each usable image of a dataset, in the order of the images."""
        usable = self.data_report.content_hashes[dataset_label(spec)]
        return folder_names([ref for ref in list_image_refs(spec) if ref.name in usable])

    def is_unseen(self, labels: Tensor) -> Tensor:
        """Return whether the class of each label (N,) is absent from training: bool (N,)."""
        if is_array_dataset(self.train):
            training_classes = {str(label) for label in read_split(self.train)[1].unique().tolist()}
        else:
            training_classes = set(folder_names(list_image_refs(self.train)))
        return torch.tensor([name not in training_classes or name in self.exclude_classes for name in self.class_names])[labels]

    # Loaders

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of the validation images."""
        return self._reference_loader()

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of the images of all test sets."""
        return self._reference_loader()

    def _reference_loader(self) -> DataLoader[dict[str, Any]]:
        items = ReconstructionEvalImages(self.reference_sets, self.binarization, self.rank_and_world_size[1])
        return self.eval_loader(items, len(items))

    # Batch processing on the device

    def prepare_train_batch(self, batch: dict[str, Any]) -> GenerationBatch:
        """Convert uint8 images to float32 in [0, 1], apply random flips, and binarize them if `binarization` is "dynamic"."""
        prepared = super().prepare_train_batch(batch)
        if self.binarization == "dynamic":
            prepared["image"] = binarize(prepared["image"], self.seed, "binarise", batch["start"])
        return prepared


class ReconstructionEvalImages(Dataset[dict[str, Any]]):
    """Evaluation batches of the images of several datasets.

    Args:
        sets: dataset name -> images.
        binarization: see `Reconstruction`.
        world_size: number of processes.
    """

    def __init__(self, sets: dict[str, ImageSet], binarization: Binarization, world_size: int = 1) -> None:
        self.sets, self.binarization = sets, binarization
        images = sum(len(image_set.labels) for image_set in sets.values())
        self.batch_size = eval_batch_size(images, world_size)
        self.parts = [
            (name, first) for name, image_set in sets.items() for first in range(0, len(image_set.labels), self.batch_size)
        ]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an evaluation batch; see `Reconstruction`."""
        dataset_name, first = self.parts[index]
        image, label = (tensor[first : first + self.batch_size] for tensor in self.sets[dataset_name])
        image = image.float() / 255
        if self.binarization == "dynamic":
            image = binarize(image, 0, f"binarise/{dataset_name}", first)
        indices = range(first, first + len(image))
        return {
            "image": image,
            "label": label,
            "index": torch.tensor(indices),
            "name": [f"{i:06d}" for i in indices],
            "dataset": [dataset_name] * len(image),
        }


def is_array_dataset(spec: str) -> bool:
    """Return whether `spec` is a dataset of the catalog, or one of its splits, that is stored as arrays."""
    name = spec.partition("/")[0]
    return name in catalog() and bool(get_dataset(name).arrays)


def binarize(image: Tensor, seed: int, stream: str, start: int) -> Tensor:
    """Sample pixels as 0 or 1 with their values as probabilities; the sample is a function of the image's position.

    Args:
        image: (N, C, H, W) float in [0, 1].
        seed, stream: seed and stream of the random numbers.
        start: position of the first image.

    Returns:
        (N, C, H, W) of 0 and 1, same dtype.
    """
    size = image[0].numel()
    blocks = -(-size // 16)  # four words per block, four pixels per word
    words = random_words(seed, stream, start * blocks, len(image) * blocks).view(np.uint16).reshape(len(image), -1)
    thresholds = to_device_async(words[:, :size].astype(np.float32) + 0.5, image.device).view(image.shape)
    return (image * 65536 > thresholds).to(image.dtype)
