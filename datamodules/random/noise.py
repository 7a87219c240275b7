"""Stateless noise on `datamodules/random/philox.py`: a function of seed, stream and sample index."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from datamodules.random.philox import random_words


def uniform(seed: int, stream: str, items: Sequence[int], size: int) -> np.ndarray:
    """Sample uniform noise in (0, 1): float64 (len(items), size); a row depends only on its item.

    Args:
        seed: the run's seed.
        stream: name of the random stream.
        items: sample indices in any order; consecutive indices are fastest.
        size: values per sample.
    """
    words = _words(seed, stream, items, -(-size // 4))
    fractions = (words[:, :size] >> np.uint64(11)).astype(np.float64)
    return (fractions + 0.5) * 2.0**-53


def normal(
    seed: int, stream: str, items: Sequence[int], size: int, dtype: type[np.float32] | type[np.float64] = np.float64
) -> np.ndarray:
    """Sample standard normal noise (len(items), size) by the Box-Muller transform; a row depends only on its item.

    Args:
        seed, stream, items, size: see `uniform`.
        dtype: type of the result. float32 uses 32-bit words and single precision: it is four times as fast, has different
            values, and is truncated at 6.8 standard deviations.
    """
    if dtype is np.float64:
        pairs = -(-size // 2)
        radius, angle = np.split(uniform(seed, stream, items, 2 * pairs), 2, axis=1)
        radius, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * angle
    else:
        words = _words(seed, stream, items, -(-size // 8))  # two values per word
        fractions = words.view(np.uint32).astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
        radius, angle = np.split(fractions, 2, axis=1)
        radius, angle = np.sqrt(np.float32(-2) * np.log(radius)), np.float32(2 * np.pi) * angle
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :size]


def derive_seed(seed: int, stream: str) -> int:
    """Derive a seed in [0, 2**63) for a stateful generator from a seed and the name of a random stream."""
    return int(random_words(seed, stream, 0, 1)[0, 0] >> np.uint64(1))


def _words(seed: int, stream: str, items: Sequence[int], blocks: int) -> np.ndarray:
    """Return random words with `blocks` counter values per item: uint64 (len(items), 4 * blocks)."""
    first, count = (items[0], len(items)) if len(items) else (0, 0)
    if list(items) == list(range(first, first + count)):
        words = random_words(seed, stream, first * blocks, count * blocks)
    else:
        words = np.concatenate([random_words(seed, stream, item * blocks, blocks) for item in items])
    return words.reshape(count, 4 * blocks)


NOISE_SAMPLERS: dict[str, Callable[..., np.ndarray]] = {
    "normal": normal,
    "fast-normal": partial(normal, dtype=np.float32),
    "uniform": uniform,
}
