"""Training steps without a Trainer, as the baseline of `darkroom bench` and of the tests of all methods."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import reduce
from operator import add
from typing import Any

import torch
from torch.optim import Optimizer

from modules.training.ema import EMA
from modules.training.image_pool import ImagePool
from modules.training.method import Method
from modules.training.phases import Batch, batch_size_of, bind_phases, map_tensors, train_only

Step = Callable[[], None]
Precision = Callable[[], AbstractContextManager[Any]]  # context of forward passes, such as autocast


def make_reference_step(
    method: Method,
    batches: Iterator[Batch],
    optimizers: Mapping[str, Any],
    precision: Precision = nullcontext,
) -> Step:
    """Return a handwritten training step: update each network in turn, with the other networks frozen.

    Args:
        method: the method to train, after `setup`; the first step is that after its `images_seen`.
        batches: training batches.
        optimizers: optimizers by name, see `make_optimizers`.
        precision: context of the forward passes, such as autocast.
    """
    phases = bind_phases(method.phases(), optimizers)
    images_seen, step_index = method.images_seen, 0

    def step() -> None:
        nonlocal images_seen, step_index
        batch = next(batches)
        size = batch_size_of(batch)
        step_index += 1
        due = [bound for bound in phases if not step_index % bound.phase.every_n_steps]
        first_inputs: Batch = {}  # of the first update of the step; later phases use them too
        for bound in due:
            for repeat_index in range(bound.phase.n_updates):
                inputs = first_inputs
                if repeat_index or not first_inputs:
                    with train_only([bound] if repeat_index else due, phases), precision():
                        ids = range(images_seen, images_seen + size)
                        inputs = {**batch, "sample_ids": ids, "repeat_index": repeat_index}
                        inputs.update(method.shared_forward(inputs))
                first_inputs = first_inputs or inputs
                with train_only([bound], phases):
                    for group in bound.optimizer.param_groups:
                        group.update(method.optimizer_settings(bound.phase, images_seen))
                    bound.optimizer.zero_grad()
                    with precision():
                        loss = reduce(add, bound.phase.losses(inputs).values())
                    loss.backward()
                    if bound.phase.max_grad_norm is not None:
                        torch.nn.utils.clip_grad_norm_(bound.parameters, bound.phase.max_grad_norm)
                    bound.optimizer.step()
        for child in method.children():
            if isinstance(child, EMA | ImagePool):
                child.update(size)
        images_seen += size
        method.images_seen = images_seen

    return step


def make_optimizers(method: Method) -> dict[str, Optimizer]:
    """Create new optimizers for a method, by name."""
    optimizers = method.configure_optimizers()
    return dict(zip(method.optimizer_names, optimizers if isinstance(optimizers, list) else [optimizers], strict=True))


def bare_batches(data: Any, method: Method) -> Iterator[Batch]:
    """Yield training batches of a datamodule for a method, without a Trainer, from the position after its `images_seen`."""
    data = copy(data)  # a copy has a separate position in the stream
    data.position = lambda: method.images_seen
    for batch in data.train_dataloader():
        if data.deferred is not None:  # the data lie on the device
            batch = data.deferred.read(batch)
        yield data.prepare_train_batch(map_tensors(batch, lambda tensor: tensor.to(method.device)))
