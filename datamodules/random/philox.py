"""Counter-based random numbers: a function of (seed, stream, global position of the sample).

All functions are stateless. The sample at position 10,000 gets the same random numbers in an uninterrupted run, in a
resumed run, and on any rank.
"""

import hashlib
import threading
from functools import lru_cache

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
    return _philox(seed, stream, start).random_raw(4 * count).reshape(count, 4)


@lru_cache(maxsize=4)  # passes of two domains; the order of B is read at each step
def permutation(seed: int, stream: str, epoch: int, length: int) -> np.ndarray:
    """Return a random order of `length` items for pass `epoch`, to be read only: int64 (length,)."""
    return np.random.Generator(_philox(seed, f"{stream}/{epoch}", 0)).permutation(length)


def randint_from_words(words: np.ndarray, limit: np.ndarray | int) -> np.ndarray:
    """Convert raw words to uniform integers in [0, limit), element by element: int64. The bias is below limit / 2**32."""
    high = words >> np.uint64(32)
    return ((high * np.asarray(limit, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)


class _Generators(threading.local):
    """The generator of each thread."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)


_GENERATORS = _Generators()


def _philox(seed: int, stream: str, counter: int) -> np.random.Philox:
    """Return `numpy.random.Philox` with the key of a stream and a counter, until the next call in this thread.

    Setting the state of a generator takes a fifth of the time that its creation takes, which asks the system for entropy.
    """
    philox = _GENERATORS.philox
    philox.state = {
        "bit_generator": "Philox",
        "state": {"counter": np.array([counter, 0, 0, 0], dtype=np.uint64), "key": stream_key(seed, stream)},
        "buffer": np.zeros(4, dtype=np.uint64),
        "buffer_pos": 4,  # empty
        "has_uint32": 0,
        "uinteger": 0,
    }
    return philox


@lru_cache(maxsize=256)
def stream_key(seed: int, stream: str) -> np.ndarray:
    """Return the key of a stream: uint64 (2,)."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
