"""Loaders as every datamodule uses them."""

import multiprocessing
import signal
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def make_loader(dataset: Dataset[Any], sampler: Sampler[Any], num_workers: int = 0) -> DataLoader[Any]:
    """A loader of what `dataset` gives for each index of `sampler`; batches are the data set's own affair.

    Args:
        dataset: what to load from.
        sampler: one of `datamodules/sampler.py`.
        num_workers: loader processes, kept for the whole run.
    """
    if num_workers:
        Finalize(None, end_workers, exitpriority=0)
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals_in_worker if num_workers else None,
    )


def ignore_signals_in_worker(worker: int) -> None:
    """Ctrl-C and schedulers signal the whole group: the run wants to end its step, so its workers must go on until then."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """At the end of the process, end workers that are still there: they would not hear Python's own SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
