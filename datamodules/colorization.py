"""Photographs for colorization."""

from collections.abc import Sequence

from pydantic import PositiveInt
from torch import Tensor

from datamodules.catalog.array_readers import read_split
from datamodules.io.image_io import to_channels
from datamodules.io.image_refs import ImageRef, dataset_label, list_image_refs
from datamodules.io.image_set import random_subset
from datamodules.photographs import Photographs, RandomCrops, center_crop, is_array_dataset, read_resized, require_multiple
from datamodules.transforms.short_side import resize_short_side


class Colorization(Photographs):
    """Photographs for colorization; evaluation crops are squares of `resize` pixels.

    Args:
        train, val, test, batch_size, streaming, num_workers, skip_bad, seed: see `Photographs`.
        size: side of a training crop in pixels, a multiple of 8; 176 in the paper.
        resize: shorter side of a resized photograph, a multiple of 8; 256 in the paper.

    Raises:
        UserError: a size is not a multiple of 8, or `resize` is smaller than `size`.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: Sequence[str] = (),
        size: PositiveInt = 176,
        resize: PositiveInt = 256,
        batch_size: int = 40,
        streaming: bool = False,
        num_workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(train, val, test, size, resize, resize, batch_size, streaming, num_workers, skip_bad, seed)
        require_multiple("size", size, 8)
        require_multiple("resize", resize, 8)
        self.sources: Tensor | list[ImageRef] | None = None  # of `training_crop`

    def photograph_subset(self, count: int | None = None) -> list[int]:
        """Return the numbers of all training photographs, or of a random subset of `count`."""
        return random_subset(len(self.crops), count).tolist()

    def training_photograph(self, number: int) -> Tensor:
        """Return a resized training photograph, uint8 (3, H, W); it requires `setup("fit")`."""
        if isinstance(self.crops, RandomCrops):
            return self.crops.images.image(number)
        return read_resized(self.crops.files[number], self.resize)

    def train_fingerprint(self) -> tuple[str, str]:
        """Return the name of the training photographs, and the first 12 digits of their fingerprint."""
        name = dataset_label(self.train)
        return name, self.data_report.fingerprints()[name][:12]

    def list_sources(self) -> Tensor | list[ImageRef]:
        """Return the training images of an array dataset, or its files, and add their hashes to the report."""
        if not is_array_dataset(self.train):
            return self.data_report.validate(list_image_refs(self.train), 1, decode=False)
        pixels, _ = read_split(self.train)
        self.data_report.add_array(self.train, pixels)
        return pixels

    def training_crop(self, position: float) -> Tensor:
        """Read the center crop of one training photograph, at a position in [0, 1) of their order.

        Returns:
            uint8 (3, resize, resize).
        """
        if self.sources is None:
            self.sources = self.list_sources()
        source = self.sources[int(position * len(self.sources))]
        if isinstance(source, Tensor):
            image = resize_short_side(to_channels(source, 3), self.resize)
        else:
            image = read_resized(source.path, self.resize)
        return center_crop(image, self.resize)
