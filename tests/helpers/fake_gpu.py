"""Training steps on tensors without values that claim to lie on a GPU.

torch's `FakeTensorMode` raises an error if an operation combines tensors of the CPU and of the GPU, or reads a value. Backward
passes and optimizers need a real device; they are left out, so gradients of penalties are zeros.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.bench.reference_loop import bare_batches, make_reference_step
from experiments.run.lightning_cli import build_cli
from experiments.run.recipes import Recipe
from modules.training.phases import map_tensors

GPU = torch.device("cuda:0")


class NoUpdates:
    """An optimizer that does not change the parameters."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = optimizer.param_groups

    def zero_grad(self) -> None:
        """Do nothing."""

    def step(self) -> None:
        """Do nothing."""


def zero_gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Return gradients that are zero, in place of those of `torch.autograd.grad`."""
    return tuple(torch.zeros_like(tensor) for tensor in ([inputs] if isinstance(inputs, Tensor) else inputs))


def assert_on_gpu(tensor: Tensor) -> Tensor:
    """Return a tensor that lies on the GPU."""
    assert tensor.device == GPU
    return tensor


def run_on_a_fake_gpu(recipe: Recipe) -> None:
    """Run two training steps of a recipe; call it in a process of its own, because it replaces functions of torch."""
    cli = build_cli("fit", recipe, ["--run", "fake", "--trainer.accelerator", "cpu"])
    data, method = cli.datamodule, cli.model
    method.plan_stages(data)
    data.setup("fit")
    method.setup("fit")
    method.configure_model()
    method.inspect_data(data)
    optimizers = method.configure_optimizers()
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    updates = {name: NoUpdates(optimizer) for name, optimizer in zip(method.optimizer_names, optimizers, strict=True)}
    make_reference_step(method, bare_batches(data, method), updates)()  # on the CPU
    content = next(iter(data.train_dataloader()))

    Tensor.pin_memory = lambda tensor, *args: tensor
    Tensor.backward = lambda *args, **kwargs: None
    torch.autograd.grad = zero_gradients
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def moved(tensor: Tensor) -> Tensor:
        fake: Tensor = mode.from_tensor(tensor.detach()).to(GPU)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    with mode:
        method._apply(moved)
        method._device = GPU
        batch = data.prepare_train_batch(map_tensors(content, moved))
        map_tensors(batch, assert_on_gpu)
        step = make_reference_step(method, iter([batch, batch]), updates)
        step()
        step()
