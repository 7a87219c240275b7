"""Our own samplers: they neither repeat nor shuffle behind our back, and their order needs no state."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from datamodules.random.philox import permutation


class InfiniteBatchSampler(Sampler[tuple[int, np.ndarray]]):
    """An endless stream of shuffled items, cut into batches.

    The stream passes over all items in an order of its own for each pass. Which item stands at a position is a function
    of the seed, so a resumed run goes on with the very next sample, and each process takes its slice of every batch.

    Args:
        length: number of items in a pass.
        batch_size: global batch, divisible by `world`.
        seed: of the order.
        position: called when iteration starts; the number of samples that all processes together have already taken.
        rank, world: this process and how many there are.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, position: Callable[[], int], rank: int = 0, world: int = 1
    ) -> None:
        self.length, self.batch_size, self.seed, self.position = length, batch_size, seed, position
        self.rank, self.local_batch_size = rank, batch_size // world

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (global position of the first sample of this process's slice, its items (batch_size / world,))."""
        start = self.position() + self.rank * self.local_batch_size
        passes, orders = range(0), np.empty(0, dtype=np.int64)
        while True:
            needed = range(start // self.length, (start + self.local_batch_size - 1) // self.length + 1)
            if needed != passes:
                passes, orders = needed, np.concatenate([self.pass_order(number) for number in needed])
            yield start, orders[start - passes[0] * self.length :][: self.local_batch_size]
            start += self.batch_size

    def pass_order(self, number: int) -> np.ndarray:
        """The order of the items in that pass."""
        return permutation(self.seed, "order", number, self.length)


class RankSampler(Sampler[int]):
    """Every item once, in order, dealt to the processes in turn: the share of one of them may be one item longer."""

    def __init__(self, length: int, rank: int = 0, world: int = 1) -> None:
        self.items = range(rank, length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)
