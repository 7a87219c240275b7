"""`python -m experiments.bench.scaling_worker RECIPE STEPS [--KEY VALUE ...]`: train and print the time of a step as JSON.

What `darkroom scaling` starts, in one process and, by torchrun, in several.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.run.run_record import hardware
from datamodules.errors import UserError
from experiments.bench.reference_loop import bare_batches, flops_of, loop, optimizers_of, wait
from experiments.run.fit import train_alone
from experiments.run.lightning_cli import build, tell
from experiments.run.recipes import find_recipe
from modules.training.method import Method
from modules.training.phases import Phase

WARM = 5  # steps before the clock starts: buffers are made, algorithms chosen


class Clock(Callback):
    """Times the steps after the first few, all processes together."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock when every process is warm, and stop it when training ends."""
        if batch_idx + 1 == WARM:
            wait(pl_module.device)
            trainer.strategy.barrier()
            self.started = time.perf_counter()
        elif trainer.should_stop:
            wait(pl_module.device)
            self.seconds = (time.perf_counter() - self.started) / (batch_idx + 1 - WARM)


class Operators(TorchDispatchMode):
    """Counts the operators that torch is given, most of them a kernel each on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one, and let it happen."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def traffic(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """What travels: the gradients of each phase's parameters, once for each of its moves.

    Returns:
        A phase each: its name, bytes of gradients, and moves a training step (below 1 for one that waits for its turn).
    """
    found = []
    for phase in phases:
        moving = sum(parameter.nbytes for parameter in phase.parameters if parameter.requires_grad)
        found.append({"name": phase.name, "bytes": moving, "moves": phase.n_updates / phase.interval})
    return found


def work(method: Method, data: Any) -> dict[str, Any]:
    """What a training step is made of: operations of arithmetic, operators, gradients that travel."""
    phases = method.phases()
    period = math.lcm(*(phase.interval for phase in phases))
    step = loop(method, bare_batches(data, method.device), optimizers_of(method))
    flops = flops_of(lambda: [step() for _ in range(period)]) / period
    with Operators() as operators:
        for _ in range(period):
            step()
    return {"flops": flops, "operators": operators.count / period, "phases": traffic(phases)}


def main(recipe: str, steps: str, *overrides: str) -> None:
    """Train, and print the seconds a step; one process alone counts its work as well."""
    cli = build("fit", find_recipe(recipe), [*overrides, "--run", "timed"])
    untrained = deepcopy(cli.model) if cli.trainer.world_size == 1 else None
    clock = Clock()
    train_alone(cli, WARM + int(steps), clock)
    figures = {"batch": cli.datamodule.batch_size, "seconds": clock.seconds, "hardware": hardware(cli.trainer)}
    if untrained is not None:
        figures |= work(untrained.to(cli.model.device), cli.datamodule)
    tell(json.dumps(figures))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"darkroom: {error}")
