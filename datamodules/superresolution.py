"""Super-resolution of luma: patches to train on, whole pictures to measure on, in the setting of the papers' tables."""

from collections.abc import Sequence
from typing import Any

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import ResumableDataModule
from datamodules.catalog.catalog import DatasetNotFound
from datamodules.errors import UserError
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs
from datamodules.superresolution_datasets import KERNEL_MARGIN, InMemoryPatches, SREvalImages, StreamedPatches, read_luma
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.resize import imresize


class SuperResolution(ResumableDataModule):
    """Pairs of a bicubically shrunk picture and its original, luma only.

    Training batches are {"input": (N, 1, patch_size, patch_size), "target": (N, 1, patch_size * scale, ...)}; pictures to
    measure on come one at a time as {"input", "target", "name", "dataset"}. All are float32 in [0, 1] (the bicubic kernel
    may overshoot in "input").

    Args:
        scale: how much smaller the input is.
        train: what to train on: a set of the catalogue ("t91"), a split of one ("photographs/train"), or a folder.
        val_every_nth: every how many-th picture of `train` is kept from training, to choose the checkpoint on; 0 for none.
        val: what to choose the checkpoint on, if not pictures kept from `train`.
        test: the sets to measure on; those that are absent are named and left out.
        batch_size: global batch, over all devices.
        patch_size: side of a training patch in LR pixels, including the context that the network needs.
        border_overhang: LR pixels by which a patch may reach beyond its picture, continued by its border.
        streaming: read pictures as they are needed instead of keeping them decoded in memory; needs `num_workers`.
        num_workers: loader processes; 0 is fastest where pictures are kept in memory.
        skip_bad: leave unusable files out (and say how many) instead of refusing to start.
        seed: of the order and the places of patches.
    """

    def __init__(
        self,
        scale: int,
        train: str,
        val_every_nth: NonNegativeInt = 0,
        val: str | None = None,
        test: Sequence[str] = (),
        batch_size: int = 16,
        patch_size: PositiveInt = 25,
        border_overhang: NonNegativeInt = 0,
        streaming: bool = False,
        num_workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, skip_bad)
        self.scale, self.train, self.val_every_nth, self.val, self.test = scale, train, val_every_nth, val, test
        self.patch_size, self.border_overhang, self.streaming = patch_size, border_overhang, streaming

    # What is where

    def setup(self, stage: str) -> None:
        """Find, read and check the pictures of a stage.

        Raises:
            MissingData: what is to be trained or measured on is not here.
            BadImage: files are unusable; the message names each of them.
            Refused: keys do not fit together.
        """
        if stage == "fit":
            self._setup_training()
        window = 11 + 2 * self.scale  # SSIM's, inside a cropped border
        smallest = window + -window % self.scale  # images are cropped to multiples of the scale
        if stage in ("fit", "validate"):
            self.val_pictures = SREvalImages(self.data_report.validate(self._validation(), smallest), self.scale)
        if stage == "test":
            self.test_pictures = SREvalImages(self.data_report.validate(self._load_test_sets(), smallest), self.scale)

    def _setup_training(self) -> None:
        smallest = (self.patch_size - 2 * self.border_overhang) * self.scale
        pictures = self.data_report.validate(self._split_train()[0], smallest, whole=not self.streaming)
        files = [picture.path for picture in pictures]
        rank_and_world = {
            "seed": self.seed,
            "size": (self.patch_size + 2 * KERNEL_MARGIN) * self.scale,
            "grid": self.scale,
            "border_overhang": (self.border_overhang + KERNEL_MARGIN) * self.scale,
        }
        self.patches: InMemoryPatches | StreamedPatches
        if self.streaming:
            self.patches = StreamedPatches(files, **rank_and_world)
        else:
            self.patches = InMemoryPatches(RaggedImageBuffer([read_luma(path, self.scale) for path in files]), **rank_and_world)

    def _split_train(self) -> tuple[list[ImageRef], list[ImageRef]]:
        """The pictures to train on and those kept from training."""
        pictures = list_image_refs(self.train, self.scale)
        if not self.val_every_nth:
            return pictures, []
        val_every_nth = range(self.val_every_nth // 2, len(pictures), self.val_every_nth)
        if not val_every_nth:
            raise UserError(f"data.val_every_nth: every {self.val_every_nth}th of {len(pictures)} pictures is none")
        return [picture for i, picture in enumerate(pictures) if i not in val_every_nth], [pictures[i] for i in val_every_nth]

    def _validation(self) -> list[ImageRef]:
        if self.val_every_nth:
            return [picture._replace(data_set=f"{picture.data_set}-holdout") for picture in self._split_train()[1]]
        if self.val is None:
            raise UserError("data.val: name a set to choose the checkpoint on, or keep pictures by data.val_every_nth")
        return list_image_refs(self.val, self.scale)

    def _load_test_sets(self) -> list[ImageRef]:
        names = [dataset_label(spec) for spec in self.test]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"data.test: two sets would both be called {twice[0]}; rename one of the folders")
        pictures: list[ImageRef] = []
        for spec in self.test:
            try:
                pictures += list_image_refs(spec, self.scale)
            except DatasetNotFound as error:
                self.missing_sets.append(str(error))
        if not pictures:
            raise DatasetNotFound("; ".join(self.missing_sets) or "data.test: names no data set")
        return pictures

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches of uint8 patches, (N, 1, P, P) each; `on_after_batch_transfer` makes the pairs."""
        if self.num_workers and isinstance(self.patches, InMemoryPatches):
            self.patches.store.share_memory()
        return self.train_loader(self.patches, len(self.patches))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The pictures that choose the checkpoint, one at a time."""
        return self.eval_loader(self.val_pictures, len(self.val_pictures))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The pictures of all test sets, one at a time."""
        return self.eval_loader(self.test_pictures, len(self.test_pictures))

    # A training batch on its way

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """On the device, make pairs of the patches."""
        if "patches" not in batch:
            return batch
        self.samples_seen += self.batch_size
        return self.prepare_train_batch(batch["patches"])

    def prepare_train_batch(self, patches: Tensor) -> dict[str, Tensor]:
        """Shrink uint8 patches (N, 1, P, P), cut with a margin for the kernel's reach, into inputs and targets."""
        high = patches.float() / 255
        size = self.patch_size + 2 * KERNEL_MARGIN
        low = imresize(high, (size, size))[..., KERNEL_MARGIN:-KERNEL_MARGIN, KERNEL_MARGIN:-KERNEL_MARGIN]
        margin = KERNEL_MARGIN * self.scale
        return {"input": low.contiguous(), "target": high[..., margin:-margin, margin:-margin]}
