"""Stateless samplers: the order depends only on the seed and the position, and no item is skipped."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from datamodules.random.philox import permutation


class InfiniteBatchSampler(Sampler[tuple[int, np.ndarray]]):
    """An infinite stream of shuffled items, split into batches.

    Each pass over the items has a different order. The item at a position is a function of the seed, so a resumed run continues
    with the next sample. Each rank takes its slice of every batch.

    Args:
        length: number of items in a pass.
        batch_size: global batch size, divisible by `world_size`, or a function that maps a position to it.
        seed: seed of the order.
        position: function, called when iteration starts, that returns the number of samples taken so far by all ranks.
        rank, world_size: index of this process and number of processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int | Callable[[int], int],
        seed: int,
        position: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length, self.batch_size, self.seed, self.position = length, batch_size, seed, position
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the global position of the slice's first sample, and the slice's items: int64 (batch_size / world_size,)."""
        position = self.position()
        passes, orders = range(0), np.empty(0, dtype=np.int64)
        while True:
            batch_size = self.batch_size if isinstance(self.batch_size, int) else self.batch_size(position)
            size = batch_size // self.world_size
            start = position + self.rank * size
            needed_passes = range(start // self.length, (start + size - 1) // self.length + 1)
            if needed_passes != passes:
                passes, orders = needed_passes, np.concatenate([self.pass_order(pass_index) for pass_index in needed_passes])
            yield start, orders[start - passes[0] * self.length :][:size]
            position += batch_size

    def pass_order(self, pass_index: int) -> np.ndarray:
        """Return the order of the items in a pass: int64 (length,)."""
        return permutation(self.seed, "order", pass_index, self.length)


class GroupedBatchSampler(InfiniteBatchSampler):
    """Shuffled items in batches of one group, such as wide and tall images.

    As in `InfiniteBatchSampler`, each pass contains each item once, in an order that is a function of the seed. The last
    batches of a pass contain the remaining items of all groups.

    Args:
        groups: group of each item, (length,).
        batch_size: global batch size, the same at every position.
        seed, position, rank, world_size: see `InfiniteBatchSampler`.
    """

    def __init__(
        self,
        groups: np.ndarray,
        batch_size: int,
        seed: int,
        position: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(len(groups), batch_size, seed, position, rank, world_size)
        self.groups, self.group_size = groups, batch_size

    def pass_order(self, pass_index: int) -> np.ndarray:
        """Return the order of the items in a pass: int64 (length,)."""
        items = super().pass_order(pass_index)
        begun = -pass_index * self.length % self.group_size  # items that complete the last batch of the pass before
        batches, open_batches = [items[:begun]], dict[int, list[int]]()
        for item in items[begun:]:
            batch = open_batches.setdefault(int(self.groups[item]), [])
            batch.append(item)
            if len(batch) == self.group_size:
                batches.append(np.array(open_batches.pop(int(self.groups[item]))))
        return np.concatenate([*batches, *(np.array(batch) for batch in open_batches.values())]).astype(np.int64)


class RankSampler(Sampler[int]):
    """Items rank, rank + world_size, ...: each item occurs once over all ranks, without padding.

    Exception: if there are fewer items than ranks, a rank without items gets a duplicate. Lightning skips a loop without
    batches, including its hooks, and the other ranks would then wait forever. Metrics count each item once.

    Args:
        length: number of items.
        rank, world_size: index of this process and number of processes.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        duplicate = [rank % length] if length else []
        self.items: Sequence[int] = range(rank, length, world_size) or duplicate

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)
