"""DataLoader settings shared by all datamodules."""

import multiprocessing
import signal
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.io.copy_ahead import CopyAhead

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def make_loader(
    dataset: Dataset[Any], sampler: Sampler[Any], num_workers: int = 0, target: torch.device | None = None
) -> DataLoader[Any]:
    """Create a loader of `dataset[index]` for each index of `sampler`; the dataset returns complete batches.

    Args:
        dataset: dataset to load from.
        sampler: a sampler of `datamodules/sampler.py`.
        num_workers: loader processes, persistent for the run.
        target: GPU to which batches are copied ahead; None to leave them in the main memory.
    """
    if num_workers:
        Finalize(None, end_workers, exitpriority=0)
    settings: dict[str, Any] = {
        "sampler": sampler,
        "batch_size": None,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": ignore_signals_in_worker if num_workers else None,
    }
    return DataLoader(dataset, **settings) if target is None else CopyAhead(dataset, target, **settings)


def ignore_signals_in_worker(worker: int) -> None:
    """Ignore signals to the process group, so that the main process can finish its step with live workers."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def end_workers() -> None:
    """Kill remaining workers at exit; they ignore the SIGTERM that Python sends."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
