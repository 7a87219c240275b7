"""A pool of earlier fakes for a discriminator to see again."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datamodules.random.noise import uniform


class ImagePool(nn.Module):
    """Half of the time a discriminator sees an earlier fake, whose place the newest takes: CycleGAN, Section 4.

    A. Shrivastava et al. Learning from Simulated and Unsupervised Images through Adversarial Training. arXiv:1612.07828.

    There is one pool for all processes, and what a sample does to it is a function of its position in the stream; so it is the
    same however the work is split, and as a part of the method it is in the checkpoint. The samples of a step see the
    pool as it was before that step; `Method` calls `update` after it.

    Args:
        capacity: how many fakes it holds; 0 for none, then a discriminator sees the newest alone.
        shape: (C, H, W) of a fake.
        stream: name of its random draws; different pools have different names.
        seed: of these.
    """

    fakes: Tensor

    def __init__(self, capacity: int, shape: Sequence[int], stream: str, seed: int = 0) -> None:
        super().__init__()
        self.capacity, self.stream, self.seed = capacity, stream, seed
        self.register_buffer("fakes", torch.zeros(capacity, *shape))
        self.pending: list[tuple[range, Tensor]] = []  # in this step: positions and fakes

    def query(self, images: Tensor, positions: range, n_seen: int) -> Tensor:
        """What the discriminator sees in place of the newest fakes, without gradients.

        Args:
            images: fakes (N, C, H, W).
            positions: of their samples in the stream.
            n_seen: how many samples came before this step.

        Returns:
            (N, C, H, W).
        """
        images = images.detach()
        if not self.capacity:
            return images
        self.pending.append((positions, images))
        slot_indices = self.slot_indices(positions)
        filled = min(n_seen, self.capacity)
        use_stored = [0 <= slot < filled and slot != position for slot, position in zip(slot_indices, positions, strict=True)]
        if not any(use_stored):
            return images
        chosen = self.fakes[to_device_async(slot_indices, images.device)].to(images.dtype)
        return torch.where(to_device_async(use_stored, images.device)[:, None, None, None], chosen, images)

    def slot_indices(self, positions: range) -> list[int]:
        """Where each sample's fake will be kept: the first ones fill the pool, of the others half is kept; -1 for nowhere."""
        keep_draw, slot_draw = uniform(self.seed, self.stream, positions, 2).T
        return [
            position if position < self.capacity else int(place * self.capacity) if share < 0.5 else -1
            for position, share, place in zip(positions, keep_draw, slot_draw, strict=True)
        ]

    @torch.no_grad()
    def update(self, batch_size: int) -> None:
        """Keep what has arrived in a step of `batch_size` images, in all processes together."""
        if not self.pending:
            return
        first = min(positions.start for positions, _ in self.pending)
        images = torch.cat([fakes for _, fakes in self.pending]).to(self.fakes.dtype)
        self.pending = []
        if len(images) < batch_size:  # this process's share alone
            rank, gathered = dist.get_rank(), images.new_empty(batch_size, *images.shape[1:])
            dist.all_gather_into_tensor(gathered, images.contiguous())
            first, images = first - rank * len(images), gathered
        last = {slot: i for i, slot in enumerate(self.slot_indices(range(first, first + batch_size))) if slot >= 0}
        if last:
            device = self.fakes.device
            self.fakes[to_device_async(list(last), device)] = images[to_device_async(list(last.values()), device)]


def to_device_async(values: list[Any], device: torch.device) -> Tensor:
    """A tensor on a device, which need not be waited for."""
    made = torch.tensor(values)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
