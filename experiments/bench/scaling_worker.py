"""`python -m experiments.bench.scaling_worker RECIPE STEPS [--KEY VALUE ...]`: train, and print the time per step as JSON.

`darkroom scaling` runs this module in a single process, or in several processes with torchrun.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.run.run_record import hardware
from datamodules.errors import UserError
from experiments.bench.reference_loop import Precision, bare_batches, make_optimizers, make_reference_step
from experiments.bench.timing import count_flops, synchronize
from experiments.run.execute import destroy_process_groups
from experiments.run.fit import skip_to_last_stage, train_without_eval
from experiments.run.lightning_cli import build_cli, print_rank_zero
from experiments.run.recipes import find_recipe
from modules.training.method import Method
from modules.training.phases import BoundPhase, bind_phases

WARMUP_STEPS = 5  # untimed steps in which buffers are allocated and algorithms are selected


class StepTimer(Callback):
    """Callback that measures the seconds per step after the warm-up, synchronized across ranks."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock when every rank has finished its warm-up, and stop it when training ends."""
        if batch_idx + 1 == WARMUP_STEPS:
            synchronize(pl_module.device)
            trainer.strategy.barrier()
            self.started = time.perf_counter()
        elif trainer.should_stop:
            synchronize(pl_module.device)
            self.seconds = (time.perf_counter() - self.started) / (batch_idx + 1 - WARMUP_STEPS)


class OpCounter(TorchDispatchMode):
    """Dispatch mode that counts the operators of torch; most of them launch one kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operator and call it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def gradient_bytes(phases: Sequence[BoundPhase]) -> list[dict[str, Any]]:
    """Return the gradient bytes that ranks exchange for each phase.

    Returns:
        One entry per phase: "name", "bytes" per update, and "moves", the updates per training step (below 1 if the phase is
        not used in each step).
    """
    return [
        {
            "name": bound.phase.name,
            "bytes": sum(parameter.nbytes for parameter in bound.parameters),
            "moves": bound.phase.n_updates / bound.phase.every_n_steps,
        }
        for bound in phases
    ]


def step_cost(method: Method, data: Any, precision: Precision) -> dict[str, Any]:
    """Return "flops", "operators" and gradient bytes ("phases") per training step."""
    method.setup("fit")
    optimizers = make_optimizers(method)
    phases = bind_phases(method.phases(), optimizers)
    period = math.lcm(*(bound.phase.every_n_steps for bound in phases))
    step = make_reference_step(method, bare_batches(data, method), optimizers, precision)
    flops = count_flops(lambda: [step() for _ in range(period)]) / period
    with OpCounter() as operators:
        for _ in range(period):
            step()
    return {"flops": flops, "operators": operators.count / period, "phases": gradient_bytes(phases)}


def exchange_cost(device: torch.device) -> dict[str, float]:
    """Return the "latency" in seconds of an all-reduce of 4 bytes, and the "bytes_per_second" of one of 8 MiB (medians)."""
    small, large = (torch.zeros(count, device=device) for count in (1, 2**21))
    seconds = {}
    for tensor in (small, large):
        times = []
        for _ in range(20):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            synchronize(device)
            times.append(time.perf_counter() - start)
        seconds[tensor.nbytes] = statistics.median(times)
    return {"latency": seconds[small.nbytes], "bytes_per_second": large.nbytes / seconds[large.nbytes]}


def main(recipe: str, steps: str, *overrides: str) -> None:
    """Train and print the seconds per step; with a single rank, also the cost of a step."""
    cli = build_cli("fit", find_recipe(recipe), [*overrides, "--run", "timed"])
    skip_to_last_stage(cli)
    untrained = deepcopy(cli.model) if cli.trainer.world_size == 1 else None
    timer = StepTimer()
    train_without_eval(cli, WARMUP_STEPS + int(steps), timer)
    result = {"batch": cli.model.stage_plan.batch_sizes[-1], "seconds": timer.seconds, "hardware": hardware(cli.trainer)}
    if cli.trainer.world_size > 1:
        result |= exchange_cost(cli.model.device)
    if untrained is not None:
        result |= step_cost(untrained.to(cli.model.device), cli.datamodule, cli.trainer.precision_plugin.forward_context)
    print_rank_zero(json.dumps(result))
    destroy_process_groups()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"darkroom: {error}")
