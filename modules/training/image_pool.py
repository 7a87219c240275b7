"""Pool of earlier fake images for training a discriminator."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datamodules.random.noise import uniform
from datamodules.transforms.to_device import to_device_async


class ImagePool(nn.Module):
    """Pool that replaces half of the new fakes with stored ones, and stores the new ones in their slots (CycleGAN, Section 4).

    A. Shrivastava et al. Learning from Simulated and Unsupervised Images through Adversarial Training. arXiv:1612.07828.

    All ranks share one pool. A sample's effect on it depends only on the sample's id, so the pool is the same for any number
    of ranks and micro-batches. It is a submodule of the method, so checkpoints contain it. Stored fakes are always from earlier
    steps, because `Method` calls `update` after each step.

    Args:
        capacity: number of stored fakes; 0 disables the pool.
        shape: shape (C, H, W) of a fake.
        stream: name of the random stream; different pools need different names.
        seed: seed of the random stream.
    """

    fakes: Tensor

    def __init__(self, capacity: int, shape: Sequence[int], stream: str, seed: int = 0) -> None:
        super().__init__()
        self.capacity, self.stream, self.seed = capacity, stream, seed
        self.register_buffer("fakes", torch.zeros(capacity, *shape))
        self.pending: list[tuple[range, Tensor]] = []  # sample ids and fakes of this step

    def query(self, images: Tensor, sample_ids: range, n_seen: int) -> Tensor:
        """Replace some new fakes with stored ones.

        Args:
            images: new fakes (N, C, H, W).
            sample_ids: ids of the samples, one for each fake.
            n_seen: number of samples before this step.

        Returns:
            Fakes for the discriminator, (N, C, H, W), without gradients.
        """
        images = images.detach()
        if not self.capacity:
            return images
        self.pending.append((sample_ids, images))
        slot_indices = self.slot_indices(sample_ids)
        filled = min(n_seen, self.capacity)
        use_stored = [
            0 <= slot < filled and slot != sample_id for slot, sample_id in zip(slot_indices, sample_ids, strict=True)
        ]
        if not any(use_stored):
            return images
        stored = self.fakes[to_device_async(slot_indices, images.device)].to(images.dtype)
        return torch.where(to_device_async(use_stored, images.device)[:, None, None, None], stored, images)

    def slot_indices(self, sample_ids: range) -> list[int]:
        """Return the slot of each sample's fake; -1 for fakes that are not stored, which are half of them in a full pool."""
        keep_draws, slot_draws = uniform(self.seed, self.stream, sample_ids, 2).T
        return [
            sample_id if sample_id < self.capacity else int(slot_draw * self.capacity) if keep_draw < 0.5 else -1
            for sample_id, keep_draw, slot_draw in zip(sample_ids, keep_draws, slot_draws, strict=True)
        ]

    @torch.no_grad()
    def update(self, batch_size: int) -> None:
        """Store the fakes of a training step of `batch_size` images, counted over all ranks."""
        if not self.pending:
            return
        first_id = min(sample_ids.start for sample_ids, _ in self.pending)
        images = torch.cat([fakes for _, fakes in self.pending]).to(self.fakes.dtype)
        self.pending = []
        device, local_size = self.fakes.device, len(images)
        first_id -= dist.get_rank() * local_size if local_size < batch_size else 0
        newest_by_slot = {
            slot: i for i, slot in enumerate(self.slot_indices(range(first_id, first_id + batch_size))) if slot >= 0
        }
        if not newest_by_slot:
            return
        if local_size == batch_size:
            stored = images[to_device_async(list(newest_by_slot.values()), device)]
        else:
            stored = exchange(images, list(newest_by_slot.values()))
        self.fakes[to_device_async(list(newest_by_slot), device)] = stored


def exchange(images: Tensor, indices: list[int]) -> Tensor:
    """Send images between ranks, each of which has an equal part of a batch; images that are not requested are not sent.

    Args:
        images: images (N, ...) of this rank.
        indices: positions in the batch of all ranks, equal on all ranks.

    Returns:
        The images at `indices`, in that order, on every rank.
    """
    local_size, world_size = len(images), dist.get_world_size()
    requested = [[i % local_size for i in indices if i // local_size == rank] for rank in range(world_size)]
    count = max(map(len, requested))  # ranks with fewer images send some that are not used
    own = requested[dist.get_rank()]
    padded = to_device_async(own + [0] * (count - len(own)), images.device)
    gathered = images.new_empty(world_size * count, *images.shape[1:])
    dist.all_gather_into_tensor(gathered, images[padded].contiguous())
    positions = [i // local_size * count + requested[i // local_size].index(i % local_size) for i in indices]
    return gathered[to_device_async(positions, images.device)]
