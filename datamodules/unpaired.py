"""Unpaired translation: training crops and full evaluation images of two domains."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.batches import UnpairedBatch
from datamodules.catalog.domains import DomainImage, load_domains
from datamodules.errors import UserError
from datamodules.io.decoded_cache import decode_images
from datamodules.io.image_io import InvalidImage, check_size, pixel_hash
from datamodules.random.noise import derive_seed
from datamodules.random.philox import randint_from_words, random_words
from datamodules.sampler import InfiniteBatchSampler


class Unpaired(ResumableDataModule):
    """Images of two domains, A and B, shuffled independently.

    Training batches are {"A", "B"}: (N, 3, crop, crop) float32 in [0, 1], random crops with random flips. Evaluation
    batches are {"image": (1, 3, H, W), "direction": ["AtoB" or "BtoA"], "name", "dataset"} of one image, and "mask", uint8
    (1, H', W') in the original size, if the image has labels.

    Args:
        train: the two training domains, see `load_domains`: "horse2zebra/train", "camvid/train", or "<folder>/train".
        val: the two validation domains, also used for previews.
        test: pairs of domains to evaluate; absent ones are reported and skipped.
        crop: side of a training crop in pixels.
        resize: side of the square to which training images are resized before cropping, 286 for a crop of 256 in the paper
            (evaluation images are resized to `crop`); None to keep the original sizes.
        hflip: flip training crops left to right with probability 0.5.
        max_val_images: maximum number of validation images per domain, at least 1.
        batch_size: global batch size, over all devices.
        num_workers: loader processes; 0 is fastest, because all images are in memory.
        seed: seed of the orders, crops and flips.

    Raises:
        UserError: `resize` is smaller than `crop`, or `max_val_images` is less than 1.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: Sequence[str] = (),
        crop: int = 256,
        resize: int | None = 286,
        hflip: bool = True,
        max_val_images: int = 20,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.train, self.val, self.test = train, val, test
        self.crop, self.resize, self.hflip, self.max_val_images = crop, resize, hflip, max_val_images
        if resize is not None and resize < crop:
            raise UserError(f"data.resize: {resize} is smaller than data.crop: {crop}. Use at least {crop}, or null")
        if max_val_images < 1:
            raise UserError(f"data.max_val_images: {max_val_images} must be at least 1")

    # Setup

    def setup(self, stage: str) -> None:
        """Locate, read and validate the images of a stage.

        Raises:
            DatasetNotFound: a dataset is not installed.
            InvalidImage: images are unusable; the message names each of them.
        """
        if stage == "fit":
            images_a, images_b = load_domains(self.train)
            self.train_crops = UnpairedCrops(
                self._read(images_a, self.resize), self._read(images_b, self.resize), self.crop, self.hflip, self.seed
            )
        if stage in ("fit", "validate"):
            images_a, images_b = load_domains(self.val)
            self.val_images = self._make_eval_images(images_a[: self.max_val_images], images_b[: self.max_val_images])
        if stage == "test":
            self.test_images = self._load_test_sets()

    def _load_test_sets(self) -> "UnpairedEvalImages":
        pairs = self.read_test_sets(load_domains)
        return self._make_eval_images(*([image for pair in pairs for image in pair[i]] for i in (0, 1)))

    def _make_eval_images(self, images_a: Sequence[DomainImage], images_b: Sequence[DomainImage]) -> "UnpairedEvalImages":
        side = None if self.resize is None else self.crop
        pixels = self._read(images_a, side) + self._read(images_b, side)
        return UnpairedEvalImages([*images_a, *images_b], pixels, len(images_a))

    def _read(self, domain_images: Sequence[DomainImage], side: int | None) -> list[Tensor]:
        """Read the images of a domain and record their content hashes."""

        def read(number: int) -> tuple[Tensor, str]:
            domain_image = domain_images[number]
            pixels = domain_image.pixels()
            if side is None:
                check_size(pixels.shape[-1], pixels.shape[-2], domain_image.image.path, self.crop)
            return pixels if side is None else domain_image.resize_square(pixels, side), pixel_hash(pixels)

        origins = [(domain_image.palette_name, domain_image.columns) for domain_image in domain_images]
        settings = f"{f'original size, at least {self.crop}' if side is None else f'square of {side}'}: {origins}"
        decoded = decode_images([domain_image.source for domain_image in domain_images], settings, read)
        if errors := [reason for reason, _ in decoded.results if reason]:
            raise InvalidImage(
                f"{len(errors)} of {len(domain_images)} images cannot be used. Replace or remove them: {'; '.join(errors)}"
            )
        if domain_images:
            paths = [domain_image.image.path for domain_image in domain_images]
            self.data_report.note_losses(domain_images[0].image.dataset, paths)
        for domain_image, (_, content_hash) in zip(domain_images, decoded.results, strict=True):
            entries = self.data_report.content_hashes.setdefault(domain_image.image.dataset, {})
            entries[f"{domain_image.palette_name}/{domain_image.image.path.parent.name}/{domain_image.image.name}"] = (
                content_hash
            )
        return decoded.images()

    @classmethod
    def list_items(cls, spec: str, init_args: dict[str, Any]) -> Sequence[Any]:
        """List the images of both domains; empty if one of them has no images."""
        images_a, images_b = load_domains(spec)
        return [*images_a, *images_b] if images_a and images_b else []

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return an infinite loader of uint8 crops of both domains; `on_after_batch_transfer` converts them to float."""
        return self.train_loader(self.train_crops, len(self.train_crops))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single validation images of both domains."""
        return self.eval_loader(self.val_images, len(self.val_images))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single images of all test sets."""
        return self.eval_loader(self.test_images, len(self.test_images))

    # Batch processing on the device

    def prepare_eval_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Convert images to float32 in [0, 1] on the device."""
        return {**batch, "image": batch["image"].float() / 255}

    def prepare_train_batch(self, batch: dict[str, Any]) -> UnpairedBatch:
        """Convert uint8 images to float32 in [0, 1]."""
        return {"A": batch["A"].float() / 255, "B": batch["B"].float() / 255}


class UnpairedCrops(Dataset[dict[str, Any]]):
    """Random crops of both domains, with random flips, indexed by the outputs of `InfiniteBatchSampler` for domain A.

    The items of B are a function of the position of the first sample; their order is independent of A.

    Args:
        images_a, images_b: images of each domain, uint8 (3, H, W).
        crop: side of the crops in pixels.
        hflip: flip crops left to right with probability 0.5.
        seed: seed of B's order, of the crop positions and of the flips.
    """

    def __init__(self, images_a: Sequence[Tensor], images_b: Sequence[Tensor], crop: int, hflip: bool, seed: int) -> None:
        self.images_a, self.images_b, self.crop, self.hflip, self.seed = images_a, images_b, crop, hflip, seed

    def __len__(self) -> int:
        """Return the number of images of domain A."""
        return len(self.images_a)

    @property
    def n_bytes(self) -> int:
        """Size of the images in bytes."""
        return sum(image.nbytes for image in [*self.images_a, *self.images_b])

    def on_device(self, device: torch.device) -> "UnpairedCrops":
        """Return a copy on a device; see `Storable`."""
        images_a, images_b = ([image.to(device) for image in images] for images in (self.images_a, self.images_b))
        return UnpairedCrops(images_a, images_b, self.crop, self.hflip, self.seed)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Return {"A", "B": uint8 (N, 3, crop, crop)}."""
        start, items = slice_
        order = InfiniteBatchSampler(len(self.images_b), len(items), derive_seed(self.seed, "B"), lambda: start)
        _, items_b = next(iter(order))
        return {
            "A": self.random_crops(self.images_a, items, start, "A"),
            "B": self.random_crops(self.images_b, items_b, start, "B"),
        }

    def random_crops(self, image_tensors: Sequence[Tensor], items: np.ndarray, start: int, domain: str) -> Tensor:
        """Crop the images `items` (N,) at random positions, for the samples from `start` on: (N, 3, crop, crop)."""
        selected = [image_tensors[item] for item in items]
        n_positions = np.array([[length - self.crop + 1 for length in image.shape[-2:]] for image in selected])
        corners = randint_from_words(random_words(self.seed, f"crop/{domain}", start, len(items))[:, :2], n_positions)
        flips = [0] * len(items)
        if self.hflip:  # here and not on the device, to which the choice would have to be copied
            flips = randint_from_words(random_words(self.seed, f"flip/{domain}", start, len(items))[:, 0], 2).tolist()
        crops = []
        for image, (top, left), flip in zip(selected, corners.tolist(), flips, strict=True):
            patch = image[:, top : top + self.crop, left : left + self.crop]
            crops.append(patch.flip(2) if flip else patch)
        return torch.stack(crops)


class UnpairedEvalImages(Dataset[dict[str, Any]]):
    """Single evaluation images: those of A, then those of B.

    Args:
        domain_images: names and labels of the images.
        image_tensors: pixels, uint8 (3, H, W) each.
        n_images_a: number of images of domain A.
    """

    def __init__(self, domain_images: Sequence[DomainImage], image_tensors: Sequence[Tensor], n_images_a: int) -> None:
        self.domain_images, self.image_tensors, self.n_images_a = domain_images, image_tensors, n_images_a

    def __len__(self) -> int:
        return len(self.domain_images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an evaluation batch of one image, uint8; see `Unpaired`."""
        domain_image = self.domain_images[index]
        item = {
            "image": self.image_tensors[index][None],
            "direction": ["AtoB" if index < self.n_images_a else "BtoA"],
            "name": [f"{'A' if index < self.n_images_a else 'B'}/{domain_image.image.name}"],
            "dataset": [domain_image.image.dataset],
        }
        if domain_image.labels:
            item["mask"] = torch.from_numpy(domain_image.labels.read_mask().astype(np.uint8))[None]
        return item
