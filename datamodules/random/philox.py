"""Counter-based random numbers: a function of (seed, stream, global position of the sample).

All functions are stateless. The sample at position 10,000 gets the same random numbers in an uninterrupted run, in a
resumed run, and on any rank.
"""

import hashlib

import numpy as np


def random_words(seed: int, stream: str, start: int, count: int) -> np.ndarray:
    """Return raw random words for the samples at positions start ... start + count - 1.

    Args:
        seed: the run's seed.
        stream: name of the random stream ("crop", "order", ...); different streams are independent.
        start: global position of the first sample.
        count: number of samples.

    Returns:
        uint64 (count, 4), uniform. Philox 4x64 (Salmon et al., 2011) generates four words per counter value, so a sample's
        words do not depend on the other samples of the call.
    """
    return np.random.Philox(key=_key(seed, stream), counter=start).random_raw(4 * count).reshape(count, 4)


def permutation(seed: int, stream: str, epoch: int, length: int) -> np.ndarray:
    """Return a random order of `length` items for pass `epoch`: int64 (length,)."""
    key = _key(seed, f"{stream}/{epoch}")
    return np.random.Generator(np.random.Philox(key=key)).permutation(length)


def randint_from_words(words: np.ndarray, limit: np.ndarray | int) -> np.ndarray:
    """Convert raw words to uniform integers in [0, limit), element by element: int64. The bias is below limit / 2**32."""
    high = words >> np.uint64(32)
    return ((high * np.asarray(limit, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)


def _key(seed: int, stream: str) -> int:
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:16], "little")
