"""Averaging of gradients over ranks, which overlaps the backward pass."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MIN_BUCKET, MAX_BUCKET, BUCKETS = 2**20, 25 * 2**20, 8  # bytes; the maximum is the default of torch's DDP


def bucket_bytes(total: int) -> int:
    """Return the size at which a bucket of gradients of `total` bytes is full: an eighth of them, within bounds.

    A single bucket could not overlap the backward pass, and small ones cost more latency than they hide.
    """
    return min(MAX_BUCKET, max(MIN_BUCKET, -(-total // BUCKETS)))


class Bucket:
    """Gradients that are averaged by one all-reduce, in one flat tensor.

    Args:
        parameters: parameters of one dtype, on one device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.flat_gradients = torch.zeros(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self.views: list[Tensor] = []  # gradients in the memory format of their parameters
        offset = 0
        for parameter in parameters:
            strides = torch.empty_like(parameter, device="meta").stride()
            self.views.append(self.flat_gradients.as_strided(parameter.shape, strides, offset))
            offset += parameter.numel()
        self.n_missing = 0  # gradients that the backward pass has not computed yet
        self.sent = self.flat_gradients  # the tensor of the all-reduce
        self.work: dist.Work | None = None

    def collect(self, index: int) -> None:
        """Copy the gradient of a parameter into the flat tensor, and replace it by a view of that tensor."""
        parameter, view = self.parameters[index], self.views[index]
        if parameter.grad is not None and parameter.grad is not view:
            view.copy_(parameter.grad)
            parameter.grad = view

    def start(self, world_size: int, dtype: torch.dtype | None) -> None:
        """Start the all-reduce: a mean in NCCL, otherwise a sum; in `dtype`, the mean of values that are divided before."""
        self.sent = self.flat_gradients if dtype is None else (self.flat_gradients / world_size).to(dtype)
        is_mean = dtype is None and self.flat_gradients.is_cuda and dist.get_backend() == "nccl"
        self.work = dist.all_reduce(self.sent, dist.ReduceOp.AVG if is_mean else dist.ReduceOp.SUM, async_op=True)
        self.is_divided = is_mean or dtype is not None

    def finish(self, world_size: int) -> None:
        """Wait for the all-reduce; the gradients are then the means over all ranks."""
        if self.work is None:
            return
        self.work.wait()
        self.work = None
        if self.sent is not self.flat_gradients:
            self.flat_gradients.copy_(self.sent)
        if not self.is_divided:
            self.flat_gradients /= world_size


class GradientAverager:
    """Mean of the gradients of one optimizer over all ranks.

    Each gradient is copied into its bucket as soon as the backward pass has computed it. The all-reduce of a bucket starts when
    its last gradient is there, while the backward pass continues. The order of the buckets is that in which `make_buckets`
    fills them, from the last parameter to the first one, approximately the order of the backward pass. Parameters without a
    gradient, such as those of unused layers, must be the same on all ranks; they keep `grad` None.

    Args:
        parameters: parameters of the optimizer. Sharded ones are left out; FSDP averages their gradients.
        world_size: number of ranks.
        dtype: data type of the exchange; None for that of the gradients.
        size: bytes at which a bucket is full, see `make_buckets`; None for `bucket_bytes`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        world_size: int,
        dtype: torch.dtype | None = None,
        size: int | None = None,
    ) -> None:
        self.world_size, self.exchange_dtype = world_size, dtype
        own = [parameter for parameter in reversed(parameters) if not isinstance(parameter, DTensor)]
        self.buckets = [Bucket(group) for group in make_buckets(own, size or bucket_bytes(sum(p.nbytes for p in own)))]
        self.n_started = 0
        self.is_recording = False  # whether the present backward pass completes the gradients
        for bucket in self.buckets:
            for index, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._collect, bucket, index))

    def prepare(self) -> None:
        """Expect the complete gradients of the next backward pass; call it before the last one of an update."""
        for bucket in self.buckets:
            bucket.n_missing = len(bucket.parameters)
        self.n_started, self.is_recording = 0, True

    def finish(self) -> None:
        """Start the remaining all-reduces, and wait for all of them."""
        self.is_recording = False
        for bucket in self.buckets[self.n_started :]:
            for index in range(len(bucket.parameters)):
                bucket.collect(index)
            if any(parameter.grad is not None for parameter in bucket.parameters):
                bucket.start(self.world_size, self.exchange_dtype)
        for bucket in self.buckets:
            bucket.finish(self.world_size)

    def _collect(self, bucket: Bucket, index: int, parameter: Tensor) -> None:
        """Collect a gradient that has been accumulated, and start the all-reduce of complete buckets, in order."""
        if not self.is_recording:
            return
        bucket.collect(index)
        bucket.n_missing -= 1
        while self.n_started < len(self.buckets) and not self.buckets[self.n_started].n_missing:
            self.buckets[self.n_started].start(self.world_size, self.exchange_dtype)
            self.n_started += 1


def make_buckets(parameters: Iterable[Any], size: int) -> list[list[Any]]:
    """Group tensors into lists of one dtype, in the order in which the lists reach `size` bytes.

    A list ends with the tensor with which it reaches that size: only the last list of a dtype is smaller.
    """
    buckets: list[list[Any]] = []
    unfilled: dict[torch.dtype, list[Any]] = {}
    for tensor in parameters:
        bucket = unfilled.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(item.nbytes for item in bucket) >= size:
            buckets.append(unfilled.pop(tensor.dtype))
    return [*buckets, *unfilled.values()]
