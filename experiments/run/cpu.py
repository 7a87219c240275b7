"""Settings of the process that make computations on a CPU faster."""

import ctypes
from contextlib import suppress

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def configure_cpu() -> None:
    """Configure the process; call it before threads start, because they inherit the first setting.

    Denormals (below 1e-38) are flushed to zero: a CPU multiplies them 200 times more slowly, and the gradients of IWAE's least
    likely samples contain many of them. By default, glibc returns large blocks to the system and faults them in again page by
    page, which takes up to half of a forward pass of a style network. The thresholds keep these blocks allocated.
    """
    torch.set_flush_denormal(True)
    with suppress(OSError, AttributeError):  # a C library other than glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # Older versions of glibc accept at most 32 MiB as the first threshold. Without it, the second one has no use.
        if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):
            mallopt(M_TRIM_THRESHOLD, 2**30)
