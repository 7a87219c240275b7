"""Reconstruction: images to train on and to be given back, their pixels as they are or binarised."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.catalog.array_readers import read_split
from datamodules.catalog.catalog import catalog, get_dataset
from datamodules.errors import UserError
from datamodules.generation import Generation, InMemoryImages
from datamodules.io.image_io import InvalidImage, pixel_hash
from datamodules.io.image_refs import dataset_label, list_image_refs
from datamodules.io.image_set import ImageSet
from datamodules.random.philox import random_words

Pixels = Literal["real-valued", "dynamic", "static"]
EVAL_BATCH = 100  # images measured together


class Reconstruction(Generation):
    """Images of one size, to train on and to measure on.

    Batches are {"image": (N, channels, size, size) float32 in [0, 1], "label": int64 (N,)}; to measure on, with
    "index", "name" and "dataset" of each image.

    Args:
        train: what to train on: a set of the catalogue ("digits"), a split of one ("mnist/train"), or a folder.
        size: side in pixels, see `image_arrays.load_image_set`; or height and width that the images of array sets must have.
        val: to measure on during training.
        test: sets to measure on after it; those that are absent are named and left out.
        binarization: "real-valued", as they are; "dynamic", each pixel drawn anew as 0 or 1 with its value as probability whenever it
            is seen (Burda et al., arXiv:1509.00519), to measure on always the same draw; "static", for sets that are
            binarised once and for all. Likelihoods of different kinds of pixels cannot be compared, and are named by them.
        channels: 1 or 3.
        exclude_classes: classes (names of folders, or digits) that training does not see.
        crop, hflip, batch_size, num_workers, skip_bad, seed: see `Generation`.
    """

    def __init__(
        self,
        train: str,
        size: int | Sequence[int],
        val: str,
        test: Sequence[str] = (),
        binarization: Pixels = "real-valued",
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
        self.binarization: Pixels = binarization
        self.exclude_classes = [str(name) for name in exclude_classes]
        self.image_hw = None if isinstance(size, int) else tuple(size)
        self.classes: list[str] = []  # by their numbers

    def setup(self, stage: str) -> None:
        """Find, read and check the images of a stage.

        Raises:
            MissingData: what is to be trained or measured on is not here.
            BadImage: files are unusable, or pixels are of another kind; the message names them.
            Refused: `exclude_classes` names what is no class of the training set, or all of its classes.
        """
        super().setup(stage)
        if stage == "fit" and self.exclude_classes:
            binarization, labels = cast(InMemoryImages, self.items).images
            names = [self.classes[label] for label in labels.unique()]
            if missing_sets := [name for name in self.exclude_classes if name not in names]:
                raise UserError(
                    f"data.exclude_classes: {', '.join(missing_sets)}: no classes of {self.train}, which has {', '.join(names)}"
                )
            kept = torch.tensor([name not in self.exclude_classes for name in self.classes])[labels]
            if not kept.any():
                raise UserError(f"data.exclude_classes: {', '.join(self.exclude_classes)} leaves nothing of {self.train}")
            self.items = InMemoryImages(ImageSet(binarization[kept], labels[kept]))

    def _read(self, spec: str) -> ImageSet:
        binarization, labels = super()._read(spec) if self.image_hw is None else self._rectangles(spec)
        binary = bool(((binarization == 0) | (binarization == 255)).all())
        if self.binarization == "static" and not binary:
            raise InvalidImage(
                f"data.binarization: static, but {spec} has values between 0 and 255; take dynamic or real-valued"
            )
        if self.binarization != "static" and binary:
            raise InvalidImage(f"data.binarization: {self.binarization}, but {spec} is binarised already; take static")
        names = [str(label) for label in labels.tolist()] if is_array_dataset(spec) else self._folders(spec)
        self.classes += sorted(set(names) - set(self.classes))
        numbers = {name: number for number, name in enumerate(self.classes)}
        return ImageSet(binarization, torch.tensor([numbers[name] for name in names]))

    def _rectangles(self, spec: str) -> ImageSet:
        if not is_array_dataset(spec):
            raise UserError(f"data.size: {list(self.image_hw or ())} is for sets of arrays; pictures of {spec} are cut square")
        binarization, labels = read_split(spec)
        if tuple(binarization.shape[1:]) != (self.channels, *(self.image_hw or ())):
            raise UserError(
                f"data.size: {list(self.image_hw or ())}, but the images of {spec} are {list(binarization.shape[1:])}"
            )
        self.data_report.content_hashes[dataset_label(spec)] = {"all": pixel_hash(binarization)}
        return ImageSet(binarization, labels)

    def _folders(self, spec: str) -> list[str]:
        """Of the usable pictures of a set, in their order."""
        validate = self.data_report.content_hashes[dataset_label(spec)]
        return [picture.path.parent.name for picture in list_image_refs(spec) if picture.name in validate]

    def is_unseen(self, labels: Tensor) -> Tensor:
        """Which of these classes (N,) training does not see: bool (N,)."""
        if is_array_dataset(self.train):
            seen = {str(label) for label in read_split(self.train)[1].unique().tolist()}
        else:
            seen = {picture.path.parent.name for picture in list_image_refs(self.train)}
        return torch.tensor([name not in seen or name in self.exclude_classes for name in self.classes])[labels]

    # Loaders

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The held-out images, some at once."""
        return self._measured()

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The images of all test sets."""
        return self._measured()

    def _measured(self) -> DataLoader[dict[str, Any]]:
        items = EvalImages(self.reference_sets, self.binarization, self.rank_and_world[1])
        return self.eval_loader(items, len(items))

    # A training batch on its way

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Training batches are made on the device; the others are ready."""
        return super().on_after_batch_transfer(batch, dataloader_idx) if "start" in batch else batch

    def prepare_train_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """uint8 images as float32 in [0, 1], mirrored and binarised as their positions say."""
        made = super().prepare_train_batch(batch)
        if self.binarization == "dynamic":
            made["image"] = binarize(made["image"], self.seed, "binarise", batch["start"])
        return made


class EvalImages(Dataset[dict[str, Any]]):
    """The images of data sets in batches, to measure on.

    Args:
        sets: by their names.
        binarization: see `Reconstruction`.
        world: processes that share them: each must get some.

    Raises:
        Refused: there are more processes than images.
    """

    def __init__(self, sets: dict[str, ImageSet], binarization: Pixels, world: int = 1) -> None:
        self.sets, self.binarization = sets, binarization
        images = sum(len(found.labels) for found in sets.values())
        if images < world:
            raise UserError(f"{', '.join(sets)}: {images} images cannot be shared by {world} processes")
        self.at_once = min(EVAL_BATCH, images // world)
        self.parts = [(name, first) for name, found in sets.items() for first in range(0, len(found.labels), self.at_once)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """See `Reconstruction`."""
        data_set, first = self.parts[index]
        image, label = (of[first : first + self.at_once] for of in self.sets[data_set])
        image = image.float() / 255
        if self.binarization == "dynamic":
            image = binarize(image, 0, f"binarise/{data_set}", first)
        numbers = range(first, first + len(image))
        return {
            "image": image,
            "label": label,
            "index": torch.tensor(numbers),
            "name": [f"{number:06d}" for number in numbers],
            "dataset": [data_set] * len(image),
        }


def is_array_dataset(spec: str) -> bool:
    """Whether it is a set of the catalogue that does not consist of picture files."""
    name = spec.partition("/")[0]
    return name in catalog() and bool(get_dataset(name).arrays)


def binarize(image: Tensor, seed: int, stream: str, start: int) -> Tensor:
    """Pixels drawn as 0 or 1 with their values as probabilities, which are a function of an image's position.

    Args:
        image: (N, C, H, W) float in [0, 1].
        seed, stream: of the draws.
        start: the first image's position.

    Returns:
        The same, of 0 and 1.
    """
    size = image[0].numel()
    blocks = -(-size // 16)  # of four words, each of which serves four pixels
    words = random_words(seed, stream, start * blocks, len(image) * blocks).view(np.uint16).reshape(len(image), -1)
    levels = torch.from_numpy(words[:, :size].astype(np.float32) + 0.5).view(image.shape)
    return (image * 65536 > levels.to(image.device)).to(image.dtype)
