"""Averages of gradients over two ranks, against closed forms and against one process on the whole batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from modules.training import averaging
from modules.training.averaging import GradientAverager, make_buckets
from modules.training.gradients import backward, optimizer_step, update_grad_scaler
from modules.training.image_pool import exchange
from modules.training.phases import BoundPhase, Phase, add_averagers
from tests.helpers.subprocess_helpers import assert_on_two_ranks


def trainer(scaler: Any = None, exchange_dtype: torch.dtype | None = None) -> SimpleNamespace:
    strategy = SimpleNamespace(exchange_dtype=exchange_dtype)
    return SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), world_size=2, strategy=strategy)


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    return nn.Sequential(*layers).double().to(memory_format=torch.channels_last)


def images(start: int, end: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 8 * 3 * 64, dtype=torch.float64).sin().view(8, 3, 8, 8)[start:end]


def train(network: nn.Module, parts: list[torch.Tensor], settings: Any, max_norm: float | None) -> None:
    """Run three optimizer steps, each on the sum of the losses of `parts`."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    bound = BoundPhase(Phase("", lambda batch: {}, max_grad_norm=max_norm), optimizer)
    if settings.world_size > 1:
        add_averagers([bound], settings)
    for _ in range(3):
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            loss = network(part).square().mean() / len(parts)
            backward(settings, loss, bound.averager if i == len(parts) - 1 else None)
        optimizer_step(settings, bound)
        update_grad_scaler(settings)


def one_process(max_norm: float | None) -> nn.Module:
    network, settings = make_network(), trainer()
    settings.world_size = 1
    train(network, [images(0, 8)], settings, max_norm)
    return network


def largest_difference(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def accumulates_and_clips(rank: int) -> None:
    for max_norm, averaging.MIN_BUCKET in ((None, 2**20), (0.01, 2**20), (0.01, 1)):  # bytes: one bucket, and several
        network = make_network()
        first = 4 * rank
        train(network, [images(first, first + 2), images(first + 2, first + 4)], trainer(), max_norm)
        assert largest_difference(network, one_process(max_norm)) < 1e-9
        assert network[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_two_ranks_with_accumulation_and_clipping_equal_one_process():
    assert_on_two_ranks(accumulates_and_clips)


def exchanges_in_bf16(rank: int) -> None:
    gradient = torch.linspace(-3, 2, 1000).exp()
    parameter = nn.Parameter(torch.zeros(1000))
    bound = BoundPhase(Phase("", lambda batch: {}), torch.optim.SGD([parameter], lr=0.0))
    settings = trainer(exchange_dtype=torch.bfloat16)
    add_averagers([bound], settings)
    backward(settings, (parameter * gradient * (1 + rank)).sum(), bound.averager)
    optimizer_step(settings, bound)
    error = (parameter.grad / (1.5 * gradient) - 1).abs().max().item()
    assert 0 < error <= 2**-7


def test_exchange_in_bf16_rounds_to_eight_bits():
    """Each of the two halves, and their sum, is rounded by at most 2^-8 of itself."""
    assert_on_two_ranks(exchanges_in_bf16)


def scales_in_fp16(rank: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    network = make_network().float()
    train(network, [images(4 * rank, 4 * rank + 4).float()], trainer(scaler), 0.01)
    assert largest_difference(network.double(), one_process(0.01)) < 1e-6
    weight = nn.Parameter(torch.zeros(3))
    bound = BoundPhase(Phase("", lambda batch: {}), torch.optim.SGD([weight], lr=1.0))
    add_averagers([bound], trainer(scaler))
    factor = float("inf") if rank else 1.0  # one rank overflows, and both skip the step
    backward(trainer(scaler), weight.sum() * factor, bound.averager)
    optimizer_step(trainer(scaler), bound)
    assert weight.tolist() == [0.0, 0.0, 0.0]


def test_scaled_gradients_of_two_ranks():
    assert_on_two_ranks(scales_in_fp16)


def starts_during_backward(rank: int) -> None:
    layers = nn.ModuleList(nn.Linear(50, 50) for _ in range(4))
    unused = nn.Linear(3, 3)
    averager = GradientAverager([*unused.parameters(), *layers.parameters()], 2, size=50 * 51 * 4)
    assert [len(bucket.parameters) for bucket in averager.buckets] == [2, 2, 2, 2, 2]
    started = []
    value = torch.full((1, 50), float(rank + 1))
    for layer in layers:
        value = layer(value)
        value.register_hook(lambda gradient: started.append(averager.n_started))
    averager.prepare()
    value.sum().backward()
    assert started == [0, 1, 2, 3]  # the gradient of a layer's output precedes those of its weights
    averager.finish()
    assert all(parameter.grad is None for parameter in unused.parameters())
    own = torch.autograd.grad(value_of(layers, rank), list(layers.parameters()))
    other = torch.autograd.grad(value_of(layers, 1 - rank), list(layers.parameters()))
    for parameter, left, right in zip(layers.parameters(), own, other, strict=True):
        assert torch.equal(parameter.grad, (left + right) / 2)


def value_of(layers: nn.ModuleList, rank: int) -> torch.Tensor:
    value = torch.full((1, 50), float(rank + 1))
    for layer in layers:
        value = layer(value)
    return value.sum()


def test_exchange_starts_during_the_backward_pass():
    torch.manual_seed(0)
    assert_on_two_ranks(starts_during_backward)


def sends_only_requested_images(rank: int) -> None:
    batch = torch.arange(16.0).view(8, 2)
    sizes = []
    gather = dist.all_gather_into_tensor

    def counting(output: torch.Tensor, value: torch.Tensor) -> None:
        sizes.append(len(value))
        gather(output, value)

    dist.all_gather_into_tensor = counting
    indices = [6, 0, 7, 1, 5]
    assert torch.equal(exchange(batch[4 * rank : 4 * rank + 4], indices), batch[indices])
    assert sizes == [3]  # of four: three from rank 1


def test_pool_receives_only_the_images_that_it_keeps():
    assert_on_two_ranks(sends_only_requested_images)


@pytest.mark.parametrize(("size", "expected"), [(24, [[3, 2, 9], [4, 2], [1], [4]]), (1, [[3], [2], [1], [9], [4], [2], [4]])])
def test_buckets_have_one_dtype_and_a_minimum_size(size, expected):
    """Only the last bucket of a dtype is smaller, also before a large tensor and between those of another dtype."""
    sizes = {torch.float32: (3, 2, 9, 4, 2, 4), torch.float64: (1,)}
    tensors = [torch.zeros(n, dtype=dtype) for dtype, numbers in sizes.items() for n in numbers]
    tensors.insert(2, tensors.pop())
    assert [[t.numel() for t in bucket] for bucket in make_buckets(tensors, size)] == expected
