"""Labeled photographs for classification."""

from collections.abc import Sequence
from typing import Any

from pydantic import PositiveInt

from datamodules.batches import ClassificationBatch
from datamodules.io.image_refs import dataset_label
from datamodules.photographs import Photographs, require_multiple


class Classification(Photographs):
    """Labeled photographs; evaluation crops have the size of training crops.

    Args:
        train, val, test, batch_size, streaming, num_workers, skip_bad, seed: see `Photographs`; a folder has one folder for
            each class.
        size: side of a crop in pixels; a multiple of 8.
        resize: shorter side of a resized photograph.

    Raises:
        UserError: `size` is not a multiple of 8, or `resize` is smaller.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: Sequence[str] = (),
        size: PositiveInt = 224,
        resize: PositiveInt = 256,
        batch_size: int = 128,
        streaming: bool = False,
        num_workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(train, val, test, size, size, resize, batch_size, streaming, num_workers, skip_bad, seed)
        require_multiple("size", size, 8)

    def prepare_train_batch(self, batch: dict[str, Any]) -> ClassificationBatch:
        """Convert uint8 images to float32 in [0, 1], and keep their labels."""
        return {**super().prepare_train_batch(batch), "label": batch["label"]}

    def train_class_count(self) -> int:
        """Return the number of classes of the training photographs; it requires `setup("fit")`."""
        return self.class_counts[dataset_label(self.train)]
