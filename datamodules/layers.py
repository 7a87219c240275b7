"""Pictures with their masks and weights, as layers of one buffer that is read at any place, a batch at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Layers:
    """Pictures of any sizes, one behind another, each pixel with all of its layers; beyond a border lies its mirror image.

    Args:
        pictures: (C, H, W) each, of one type.
    """

    def __init__(self, pictures: Sequence[Tensor]) -> None:
        self.heights = torch.tensor([picture.shape[-2] for picture in pictures])
        self.widths = torch.tensor([picture.shape[-1] for picture in pictures])
        areas = self.heights * self.widths
        self.offsets = areas.cumsum(0) - areas
        self.pixels = torch.cat([picture.flatten(1).T for picture in pictures])  # (all pixels, C)

    def __len__(self) -> int:
        return len(self.heights)

    def share(self) -> None:
        """Move the buffer to shared memory, so that loader workers read this one copy."""
        self.pixels.share_memory_()

    def nearest(self, which: np.ndarray, places: Tensor) -> Tensor:
        """The pixels nearest to places.

        Args:
            which: (B,) numbers of pictures.
            places: rows and columns, (B, 2, h, w), in pixels from the middle of the first one.

        Returns:
            (B, C, h, w).
        """
        return self._at(which, (places + 0.5).floor().long())

    def between(self, which: np.ndarray, places: Tensor) -> Tensor:
        """The same, bilinearly between pixels: float32."""
        first = places.floor()
        share = places - first  # of the next row, and of the next column
        down, across = share[:, :1], share[:, 1:]
        corner = first.long()
        step = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).view(4, 1, 2, 1, 1)
        here, right, below, opposite = (self._at(which, corner + one).float() for one in step)
        return torch.lerp(torch.lerp(here, right, across), torch.lerp(below, opposite, across), down)

    def _at(self, which: np.ndarray, places: Tensor) -> Tensor:
        chosen = torch.from_numpy(which)
        rows, columns = (
            mirrored(places[:, i], lengths[chosen].view(-1, 1, 1)) for i, lengths in enumerate((self.heights, self.widths))
        )
        index = self.offsets[chosen].view(-1, 1, 1) + rows * self.widths[chosen].view(-1, 1, 1) + columns
        return self.pixels[index].movedim(-1, 1)


def mirrored(places: Tensor, lengths: Tensor) -> Tensor:
    """Whole places on lines of these lengths, mirrored at the middle of the first and last pixel as often as needed."""
    period = (2 * lengths - 2).clamp(min=1)
    places = places.remainder(period)
    return torch.minimum(places, period - places)
