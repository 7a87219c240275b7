"""Noise on a device: that of `datamodules/random/noise.py`, which the device computes itself if it is large."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from datamodules.random.noise import NOISE_SAMPLERS
from datamodules.random.philox import stream_key
from datamodules.transforms.to_device import to_device_async

MIN_SIZE = 2**12  # values of a sample; less noise takes less time on the CPU than the start of 300 kernels on a GPU
ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW = 2**32 - 1


@torch.compiler.disable  # numpy draws the words on the CPU
def noise_on_device(
    kind: str, seed: int, stream: str, items: range, size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Sample noise (len(items), size) on a device; on a GPU, large noise differs from that of the CPU by rounding errors.

    Args:
        kind: name in `NOISE_SAMPLERS`.
        seed, stream, items, size: see `noise.uniform`; `items` are consecutive.
        device, dtype: those of the result.
    """
    if device.type not in ("cpu", "mps") and size >= MIN_SIZE:  # mps has no float64
        return DEVICE_SAMPLERS[kind](seed, stream, items, size, device).to(dtype)
    return to_device_async(torch.from_numpy(NOISE_SAMPLERS[kind](seed, stream, items, size)).to(dtype), device)


def device_words(seed: int, stream: str, start: int, count: int, device: torch.device) -> Tensor:
    """Return the words of `random_words` on a device: int64 (count, 4) with the same bits.

    Philox 4x64 with 10 rounds (Salmon et al., 2011), as in numpy. Each operation works on two of the four words at once.
    """
    key = [int(word) for word in stream_key(seed, stream)]
    keys = [[(word + i * step) % 2**64 for word, step in zip(key, KEY_STEPS, strict=True)] for i in range(ROUNDS)]
    table = to_device_async(np.array([*keys, MULTIPLIERS], dtype=np.uint64).view(np.int64)[:, :, None], device)
    multipliers = table[ROUNDS]
    counters = torch.arange(start + 1, start + 1 + count, device=device)  # numpy increments the counter first
    even = torch.stack([counters, torch.zeros_like(counters)])  # words 0 and 2, (2, count)
    odd = torch.zeros_like(even)  # words 1 and 3
    for round_key in table[:ROUNDS]:
        high, even = multiply_high(even, multipliers), even * multipliers
        even, odd = high.flip(0) ^ odd ^ round_key, even.flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=1)


def multiply_high(left: Tensor, right: Tensor) -> Tensor:
    """Return the upper 64 bits of the products of unsigned integers of 64 bits, which are stored as int64."""
    left_low, left_high = left & LOW, shift_right(left, 32)
    right_low, right_high = right & LOW, shift_right(right, 32)
    first, second = left_low * right_high, left_high * right_low
    carry = shift_right(left_low * right_low, 32) + (first & LOW) + (second & LOW)
    return left_high * right_high + shift_right(first, 32) + shift_right(second, 32) + shift_right(carry, 32)


def shift_right(words: Tensor, bits: int) -> Tensor:
    """Shift unsigned integers of 64 bits, which are stored as int64."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def uniform(seed: int, stream: str, items: range, size: int, device: torch.device) -> Tensor:
    """Sample the noise of `noise.uniform`: float64 (len(items), size)."""
    words = _words(seed, stream, items, -(-size // 4), device)
    return (shift_right(words[:, :size], 11).double() + 0.5) * 2.0**-53


def normal(seed: int, stream: str, items: range, size: int, device: torch.device) -> Tensor:
    """Sample the noise of `noise.normal`, up to rounding errors: float64 (len(items), size)."""
    radius, angle = uniform(seed, stream, items, size + size % 2, device).chunk(2, dim=1)
    return box_muller(radius, angle)[:, :size]


def fast_normal(seed: int, stream: str, items: range, size: int, device: torch.device) -> Tensor:
    """Sample the noise of `noise.normal` in single precision, up to rounding errors: float32 (len(items), size)."""
    words = _words(seed, stream, items, -(-size // 8), device)
    halves = torch.stack([words & LOW, shift_right(words, 32)], dim=-1).flatten(1)
    radius, angle = (halves.float() * 2.0**-32 + 2.0**-33).chunk(2, dim=1)
    return box_muller(radius, angle)[:, :size]


def box_muller(radius: Tensor, angle: Tensor) -> Tensor:
    """Transform uniform noise, two times (N, D), to normal noise (N, 2 D)."""
    radius, angle = (-2 * radius.log()).sqrt(), 2 * torch.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)


def _words(seed: int, stream: str, items: range, blocks: int, device: torch.device) -> Tensor:
    """Return random words with `blocks` counter values per item: int64 (len(items), 4 * blocks)."""
    words = device_words(seed, stream, items.start * blocks, len(items) * blocks, device)
    return words.view(len(items), 4 * blocks)


DEVICE_SAMPLERS: dict[str, Callable[[int, str, range, int, torch.device], Tensor]] = {
    "normal": normal,
    "fast-normal": fast_normal,
    "uniform": uniform,
}
