"""Super-resolution of luma: patches to train on, whole pictures to measure on, in the setting of the papers' tables."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.catalogue import MissingData, catalogue, locate, pixel_hash
from datamodules.images import BadImage, check_size, read_image
from datamodules.pairs import REACH, Pictures, StoredPatches, StreamedPatches, read_luma
from datamodules.resize import imresize
from datamodules.sampler import EndlessBatches, Slice
from datamodules.store import ImageStore


class SuperResolution(L.LightningDataModule):
    """Pairs of a bicubically shrunk picture and its original, luma only.

    Training batches are {"input": (N, 1, patch_size, patch_size), "target": (N, 1, patch_size * scale, ...)}; pictures to
    measure on come one at a time as {"input", "target", "name", "dataset"}. All are float32 in [0, 1] (the bicubic kernel
    may overshoot in "input").

    Args:
        scale: how much smaller the input is.
        train: what to train on: a set of the catalogue ("t91"), a split of one ("photographs/train"), or a folder.
        kept: every how many-th picture of `train` is kept from training, to choose the checkpoint on; 0 for none.
        val: what to choose the checkpoint on, if not pictures kept from `train`.
        test: the sets to measure on; those that are absent are named and left out.
        batch_size: global batch, over all devices.
        patch_size: side of a training patch in LR pixels, including the context that the network needs.
        overhang: LR pixels by which a patch may reach beyond its picture, continued by its border.
        streaming: read pictures as they are needed instead of keeping them decoded in memory; needs `workers`.
        workers: loader processes; 0 is fastest where pictures are kept in memory.
        skip_bad: leave unusable files out (and say how many) instead of refusing to start.
        seed: of the order and the places of patches.
    """

    def __init__(
        self,
        scale: int,
        train: str,
        kept: int = 0,
        val: str | None = None,
        test: Sequence[str] = (),
        batch_size: int = 16,
        patch_size: int = 25,
        overhang: int = 0,
        streaming: bool = False,
        workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.scale, self.train, self.kept, self.val, self.test = scale, train, kept, val, test
        self.batch_size, self.patch_size, self.overhang = batch_size, patch_size, overhang
        self.streaming, self.workers, self.skip_bad, self.seed = streaming, workers, skip_bad, seed
        self.position = 0  # samples taken so far, by all processes together
        self.left_out: list[str] = []
        self.absent: list[str] = []
        self.contents: dict[str, dict[str, str]] = {}

    # What is where

    def setup(self, stage: str) -> None:
        """Find, read and check the pictures of a stage.

        Raises:
            MissingData: what is to be trained or measured on is not here.
            BadImage: files are unusable; the message names each of them.
            ValueError: keys do not fit together.
        """
        world = self.trainer.world_size if self.trainer else 1
        if self.batch_size % world:
            raise ValueError(f"data.batch_size: {self.batch_size} is not divisible by {world} processes")
        if stage == "fit":
            self._setup_training()
        smallest = 11 + 2 * self.scale  # SSIM's window, inside a shaved border
        if stage in ("fit", "validate"):
            self.val_pictures = Pictures(self._usable(self._validation(), smallest), self.scale)
        if stage == "test":
            self.test_pictures = Pictures(self._usable(self._tests(), smallest), self.scale)

    def _setup_training(self) -> None:
        smallest = (self.patch_size - 2 * self.overhang) * self.scale
        files = [path for _, path in self._usable([(slug(self.train), path) for path in self._split_train()[0]], smallest)]
        place = {
            "seed": self.seed,
            "size": (self.patch_size + 2 * REACH) * self.scale,
            "grid": self.scale,
            "overhang": (self.overhang + REACH) * self.scale,
        }
        self.patches: StoredPatches | StreamedPatches
        if self.streaming:
            self.patches = StreamedPatches(files, **place)
        else:
            self.patches = StoredPatches(ImageStore([read_luma(path, self.scale) for path in files]), **place)

    def _split_train(self) -> tuple[list[Path], list[Path]]:
        """The files to train on and those kept from training."""
        files = locate(self.train, self.scale)
        kept = set(files[self.kept // 2 :: self.kept]) if self.kept else set()
        return [path for path in files if path not in kept], sorted(kept)

    def _validation(self) -> list[tuple[str, Path]]:
        if self.kept:
            return [(f"{slug(self.train)}-kept", path) for path in self._split_train()[1]]
        if self.val is None:
            raise ValueError("data.val: name a set to choose the checkpoint on, or keep pictures by data.kept")
        return [(slug(self.val), path) for path in locate(self.val, self.scale)]

    def _tests(self) -> list[tuple[str, Path]]:
        pictures: list[tuple[str, Path]] = []
        for spec in self.test:
            try:
                pictures += [(slug(spec), path) for path in locate(spec, self.scale)]
            except MissingData as error:
                self.absent.append(str(error))
            except KeyError:  # the set has no pictures for this scale
                if spec.partition("/")[0] not in catalogue():
                    raise
                self.absent.append(f"{spec} has no pictures for scale {self.scale}")
        if not pictures:
            raise MissingData("; ".join(self.absent) or "data.test: names no data set")
        return pictures

    def _usable(self, pictures: list[tuple[str, Path]], minimum: int) -> list[tuple[str, Path]]:
        """The pictures that can be used; unusable ones are refused, or left out if that is asked for."""
        with ThreadPoolExecutor() as pool:
            looks = list(pool.map(partial(_look_at, minimum=minimum), [path for _, path in pictures]))
        reasons = [reason for reason, _ in looks]
        for (data_set, path), (_, pixels) in zip(pictures, looks, strict=True):
            self.contents.setdefault(data_set, {})[path.name] = pixels
        self.left_out += [reason for reason in reasons if reason]
        usable = [picture for picture, reason in zip(pictures, reasons, strict=True) if not reason]
        bad = len(pictures) - len(usable)
        if bad and not self.skip_bad:
            raise BadImage(
                f"{bad} of {len(pictures)} pictures cannot be used (--data.skip_bad true leaves them out): "
                + "; ".join(reason for reason in reasons if reason)
            )
        if not usable:
            raise BadImage("no picture can be used: " + "; ".join(self.left_out))
        return usable

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches of uint8 patches, (N, 1, P, P) each; `on_after_batch_transfer` makes the pairs."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EndlessBatches(len(self.patches), self.batch_size, self.seed, lambda: self.position, rank, world)
        return DataLoader(
            self.patches,
            sampler=sampler,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The pictures that choose the checkpoint, one at a time."""
        return self._pictures_loader(self.val_pictures)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The pictures of all test sets, one at a time."""
        return self._pictures_loader(self.test_pictures)

    def _pictures_loader(self, pictures: "Pictures") -> DataLoader[dict[str, Any]]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(pictures, sampler=Slice(len(pictures), rank, world), batch_size=None)

    # A training batch on its way

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """On the device, make pairs of the patches."""
        if "patches" not in batch:
            return batch
        self.position += self.batch_size
        return self.pairs(batch["patches"])

    def pairs(self, patches: Tensor) -> dict[str, Tensor]:
        """Shrink uint8 patches (N, 1, P, P), cut with a margin for the kernel's reach, into inputs and targets."""
        high = patches.float() / 255
        size = self.patch_size + 2 * REACH
        low = imresize(high, (size, size))[..., REACH:-REACH, REACH:-REACH]
        margin = REACH * self.scale
        return {"input": low.contiguous(), "target": high[..., margin:-margin, margin:-margin]}

    # Resume and record

    def fingerprints(self) -> dict[str, str]:
        """For each data set in use, a hash over the names and pixels of its pictures."""
        return {
            data_set: hashlib.sha256(repr(sorted(pixels.items())).encode()).hexdigest()[:16]
            for data_set, pixels in self.contents.items()
        }

    def state_dict(self) -> dict[str, int]:
        """Where the stream of samples stands."""
        return {"position": self.position, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there.

        Raises:
            ValueError: another batch size or seed than the checkpoint's: the run would not be the same run.
        """
        for key in ("batch_size", "seed"):
            if state[key] != getattr(self, key):
                raise ValueError(f"data.{key}: {getattr(self, key)}, but the checkpoint's run had {state[key]}")
        self.position = state["position"]


def slug(spec: str) -> str:
    """What a data key is called in logs and records: "photographs/test" gives "photographs-test", a folder its name."""
    return Path(spec).name if Path(spec).is_absolute() else spec.strip("./").replace("/", "-")


def _look_at(path: Path, minimum: int) -> tuple[str, str]:
    """Why a picture cannot be used (empty if it can), and the hash of its pixels."""
    try:
        pixels = read_image(path)
        check_size(pixels, path, minimum)
    except BadImage as error:
        return str(error), ""
    return "", pixel_hash(pixels)
