"""Unpaired translation: two stacks of pictures to train on, whole pictures of both domains to measure on."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableDataModule
from datamodules.catalog.catalog import DatasetNotFound
from datamodules.catalog.domains import DomainImage, load_domains
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage, pixel_hash
from datamodules.io.loader import make_loader
from datamodules.random.noise import derive_seed
from datamodules.random.philox import randint_from_words, random_words
from datamodules.sampler import InfiniteBatchSampler, RankSampler


class Unpaired(ResumableDataModule):
    """Pictures of two domains, A and B, each shuffled by itself.

    Training batches are {"A", "B"}: (N, 3, crop, crop) float32 in [0, 1], a random part of each picture, mirrored half of the
    time. To measure on, pictures come one at a time: {"image": (1, 3, H, W), "direction": ["AtoB" or "BtoA"], "name",
    "dataset"}, and with "mask", uint8 (1, H', W'), where a picture has labels, in its own size.

    Args:
        train: the two domains, see `load_domains.load_domains`: "horse2zebra/train", "camvid/train", a folder's "photos/train".
        val: the same, to look at, and to measure on during training.
        test: pairs of domains to measure on; those that are absent are named and left out.
        crop: side of a training picture in pixels.
        resize: make every picture so wide and so high first, 286 for a crop of 256 in the paper (and as large as the crop
            to measure on); None to cut from pictures as they are.
        hflip: mirror half of the training pictures.
        max_val_images: of each domain, how many pictures a validation takes.
        batch_size: global batch, over all devices.
        num_workers: loader processes; 0 is fastest, since all is in memory.
        seed: of the orders, of where is cut, of the mirroring.
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
            raise UserError(f"data.resize: {resize} is smaller than data.crop: {crop}")
        if max_val_images < 1:
            raise UserError(f"data.max_val_images: {max_val_images} pictures are nothing to look at; at least 1")

    # What is where

    def setup(self, stage: str) -> None:
        """Find, read and check the pictures of a stage.

        Raises:
            MissingData: what is to be trained or measured on is not here.
            BadImage: pictures are unusable; the message names each of them.
        """
        if stage == "fit":
            images_a, images_b = load_domains(self.train)
            self.stacks = UnpairedCrops(
                self._read(images_a, self.resize), self._read(images_b, self.resize), self.crop, self.seed
            )
        if stage in ("fit", "validate"):
            images_a, images_b = load_domains(self.val)
            self.val_pictures = self._whole(images_a[: self.max_val_images], images_b[: self.max_val_images])
        if stage == "test":
            self.test_pictures = self._load_test_sets()

    def _load_test_sets(self) -> "EvalImages":
        both: tuple[list[DomainImage], list[DomainImage]] = ([], [])
        for spec in self.test:
            try:
                for found, more in zip(both, load_domains(spec), strict=True):
                    found += more
            except DatasetNotFound as error:
                self.missing_sets.append(f"{spec}: {error}")
        if not both[0]:
            raise DatasetNotFound("; ".join(self.missing_sets) or "data.test: names no data set")
        return self._whole(*both)

    def _whole(self, images_a: Sequence[DomainImage], images_b: Sequence[DomainImage]) -> "EvalImages":
        side = None if self.resize is None else self.crop
        return EvalImages([*images_a, *images_b], self._read(images_a, side) + self._read(images_b, side), len(images_a))

    def _read(self, members: Sequence[DomainImage], side: int | None) -> list[Tensor]:
        """The pictures of a domain, whose contents the survey takes note of."""
        with ThreadPoolExecutor() as pool:
            looks = list(pool.map(lambda member: self._inspect(member, side), members))
        if bad := [reason for reason, _ in looks if isinstance(reason, str)]:
            raise InvalidImage(f"{len(bad)} of {len(members)} pictures cannot be used: {'; '.join(bad)}")
        for member, (_, content) in zip(members, looks, strict=True):
            found = self.data_report.content_hashes.setdefault(member.picture.data_set, {})
            found[f"{member.colours}/{member.picture.path.parent.name}/{member.picture.name}"] = content
        return [pixels for pixels, _ in looks if isinstance(pixels, Tensor)]

    def _inspect(self, member: DomainImage, side: int | None) -> tuple[Tensor | str, str]:
        """A picture's pixels, or why it cannot be used, and what identifies it."""
        try:
            pixels = member.pixels()
        except InvalidImage as error:
            return str(error), ""
        if side is None and min(pixels.shape[-2:]) < self.crop:
            size = f"{pixels.shape[-1]}x{pixels.shape[-2]}"
            return f"{member.picture.path}: {size} pixels, too small: at least {self.crop}x{self.crop} are needed", ""
        return pixels if side is None else member.resize_square(pixels, side), pixel_hash(pixels)

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches of uint8 pictures of both domains; `on_after_batch_transfer` makes them float."""
        return self.train_loader(self.stacks, len(self.stacks))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Some pictures of each domain."""
        return self.eval_loader(self.val_pictures, len(self.val_pictures))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """All pictures of the test sets."""
        return self.eval_loader(self.test_pictures, len(self.test_pictures))

    def eval_loader(self, items: Dataset[Any], length: int) -> DataLoader[Any]:
        """As in `ResumableDataModule`; where there are fewer than processes, some measure the same pictures, which count once."""
        rank, world = self.rank_and_world
        return (
            super().eval_loader(items, length)
            if rank < length
            else make_loader(items, RankSampler(length, rank % length, world))
        )

    # A batch on its way

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """On the device, make floats in [0, 1] of the bytes, and mirror half of the training pictures."""
        if "image" in batch:
            return {**batch, "image": batch["image"].float() / 255}
        self.samples_seen += self.batch_size
        return self.prepare_train_batch(batch)

    def prepare_train_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """uint8 pictures as float32 in [0, 1], mirrored as their positions say."""
        made = {}
        for domain in "AB":
            image = batch[domain].float() / 255
            if self.hflip:
                words = random_words(self.seed, f"flip/{domain}", batch["start"], len(image))[:, 0]
                mirrored = torch.from_numpy(randint_from_words(words, 2) == 1).to(image.device)
                image = torch.where(mirrored[:, None, None, None], image.flip(3), image)
            made[domain] = image
        return made


class UnpairedCrops(Dataset[dict[str, Any]]):
    """Parts of pictures of both domains, by what `InfiniteBatchSampler` yields of A: the first sample's position, and A's items.

    B's items follow from the position; its order has nothing to do with A's.

    Args:
        images_a, images_b: uint8 (3, H, W) each.
        crop: side of the parts.
        seed: of B's order and of where is cut.
    """

    def __init__(self, images_a: Sequence[Tensor], images_b: Sequence[Tensor], crop: int, seed: int) -> None:
        self.images_a, self.images_b, self.crop, self.seed = images_a, images_b, crop, seed

    def __len__(self) -> int:
        """How many pictures A has."""
        return len(self.images_a)

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        """{"A", "B": uint8 (N, 3, crop, crop), "start": position of the first}."""
        start, items = slice_
        order = InfiniteBatchSampler(len(self.images_b), len(items), derive_seed(self.seed, "B"), lambda: start)
        _, items_b = next(iter(order))
        return {
            "A": self.cut(self.images_a, items, start, "A"),
            "B": self.cut(self.images_b, items_b, start, "B"),
            "start": start,
        }

    def cut(self, pictures: Sequence[Tensor], items: np.ndarray, start: int, domain: str) -> Tensor:
        """A random part of each picture, (N, 3, crop, crop), for the samples from position `start` on."""
        chosen = [pictures[item] for item in items]
        room = np.array([[length - self.crop + 1 for length in picture.shape[-2:]] for picture in chosen])
        corners = randint_from_words(random_words(self.seed, f"crop/{domain}", start, len(items))[:, :2], room)
        return torch.stack(
            [
                picture[:, top : top + self.crop, left : left + self.crop]
                for picture, (top, left) in zip(chosen, corners.tolist(), strict=True)
            ]
        )


class EvalImages(Dataset[dict[str, Any]]):
    """Pictures to measure on, one at a time: those of A, then those of B.

    Args:
        members: what is known of them.
        pictures: uint8 (3, H, W) each.
        images_a: how many of them are A's.
    """

    def __init__(self, members: Sequence[DomainImage], pictures: Sequence[Tensor], images_a: int) -> None:
        self.members, self.pictures, self.images_a = members, pictures, images_a

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """See `Unpaired`."""
        member = self.members[index]
        item = {
            "image": self.pictures[index][None],
            "direction": ["AtoB" if index < self.images_a else "BtoA"],
            "name": [f"{'A' if index < self.images_a else 'B'}/{member.picture.name}"],
            "dataset": [member.picture.data_set],
        }
        if member.labels:
            item["mask"] = torch.from_numpy(member.labels.read_mask().astype(np.uint8))[None]
        return item
