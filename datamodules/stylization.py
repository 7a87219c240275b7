"""Photographs for style transfer."""

from collections.abc import Sequence

from pydantic import PositiveInt

from datamodules.photographs import Photographs, require_multiple


class Stylization(Photographs):
    """Photographs for style transfer; evaluation crops have the size of training crops.

    Args:
        train, val, test, batch_size, streaming, num_workers, skip_bad, seed: see `Photographs`.
        size: side of a crop in pixels; a multiple of 4.
        resize: shorter side of a resized photograph; smaller photographs are enlarged.

    Raises:
        UserError: `size` is not a multiple of 4, or `resize` is smaller.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: Sequence[str] = (),
        size: PositiveInt = 256,
        resize: PositiveInt = 288,
        batch_size: int = 4,
        streaming: bool = False,
        num_workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(train, val, test, size, size, resize, batch_size, streaming, num_workers, skip_bad, seed)
        require_multiple("size", size, 4)
