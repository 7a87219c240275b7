"""Evaluation by several ranks: one rank computes what all need once, and the others receive the result."""

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist

from datamodules.errors import UserError

T = TypeVar("T")
LONGEST_METRIC = timedelta(days=1)  # which other ranks wait for; collectives of training have a shorter timeout


@cache
def _cpu_group(world: Any) -> Any:
    """Return the group of all ranks for objects on the CPU; with NCCL, they would pass through the memory of the GPUs."""
    return dist.new_group(backend="gloo", timeout=LONGEST_METRIC)


def gather(value: T, world_size: int) -> list[T]:
    """Return the objects of all ranks in the order of the ranks, on rank 0; other ranks receive an empty list."""
    if world_size == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, group=_cpu_group(dist.group.WORLD))
    return gathered or []


def on_rank_zero(function: Callable[[], T], world_size: int) -> T:
    """Call a function on rank 0 only, and return its result on all ranks.

    Raises:
        UserError: the function raised it on rank 0; it is raised on all ranks.
    """
    if world_size == 1:
        return function()
    content: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            content = [function(), None]
        except UserError as error:
            content = [None, str(error)]
    dist.broadcast_object_list(content, group=_cpu_group(dist.group.WORLD))
    if content[1] is not None:
        raise UserError(content[1])
    result: T = content[0]
    return result
