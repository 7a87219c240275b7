"""A pool of earlier fakes for a discriminator to see again."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datamodules.random.noise import uniform


class Pool(nn.Module):
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
        self.arrived: list[tuple[range, Tensor]] = []  # in this step: positions and fakes

    def exchanged(self, newest: Tensor, positions: range, seen: int) -> Tensor:
        """What the discriminator sees in place of the newest fakes, without gradients.

        Args:
            newest: fakes (N, C, H, W).
            positions: of their samples in the stream.
            seen: how many samples came before this step.

        Returns:
            (N, C, H, W).
        """
        newest = newest.detach()
        if not self.capacity:
            return newest
        self.arrived.append((positions, newest))
        slots = self.slots(positions)
        held = min(seen, self.capacity)
        earlier = [0 <= slot < held and slot != position for slot, position in zip(slots, positions, strict=True)]
        if not any(earlier):
            return newest
        chosen = self.fakes[sent(slots, newest.device)].to(newest.dtype)
        return torch.where(sent(earlier, newest.device)[:, None, None, None], chosen, newest)

    def slots(self, positions: range) -> list[int]:
        """Where each sample's fake will be kept: the first ones fill the pool, of the others half is kept; -1 for nowhere."""
        kept, which = uniform(self.seed, self.stream, positions, 2).T
        return [
            position if position < self.capacity else int(place * self.capacity) if share < 0.5 else -1
            for position, share, place in zip(positions, kept, which, strict=True)
        ]

    @torch.no_grad()
    def update(self, images: int) -> None:
        """Keep what has arrived in a step of that many images, in all processes together."""
        if not self.arrived:
            return
        first = min(positions.start for positions, _ in self.arrived)
        newest = torch.cat([fakes for _, fakes in self.arrived]).to(self.fakes.dtype)
        self.arrived = []
        if len(newest) < images:  # this process's share alone
            rank, everyone = dist.get_rank(), newest.new_empty(images, *newest.shape[1:])
            dist.all_gather_into_tensor(everyone, newest.contiguous())
            first, newest = first - rank * len(newest), everyone
        last = {slot: i for i, slot in enumerate(self.slots(range(first, first + images))) if slot >= 0}
        if last:
            device = self.fakes.device
            self.fakes[sent(list(last), device)] = newest[sent(list(last.values()), device)]


def sent(values: list[Any], device: torch.device) -> Tensor:
    """A tensor on a device, which need not be waited for."""
    made = torch.tensor(values)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
