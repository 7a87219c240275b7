"""`darkroom bench`: compare training speed with a bare PyTorch loop, and with a PIL data loader that reads single items."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from callbacks.run.run_record import cpu_name, peak_memory_mib
from datamodules.errors import UserError
from experiments.bench.reference_loop import Precision, Step, bare_batches, make_optimizers, make_reference_step
from experiments.bench.stages import bench_stages, print_stages
from experiments.bench.timing import count_flops, quartiles, synchronize
from experiments.cli.errors import parameters
from experiments.run.fit import skip_to_last_stage, train_without_eval
from experiments.run.lightning_cli import DarkroomCLI, build_cli
from experiments.run.recipes import Recipe
from experiments.tasks.registry import task_of
from modules.training.method import Method
from modules.training.phases import Batch, map_tensors

PIL_EVERY = 6  # rounds per PIL interval; a PIL interval has this many times the steps, because workers prefetch some batches
SETTLE = 0.5  # seconds for the PIL loader's workers to refill their queue before the Trainer is timed again


def bench(recipe: Recipe, overrides: list[str], rounds: int, steps: int, as_json: bool, started: float) -> None:
    """Time the last stage of training in interleaved intervals, then inference, and print the results by name.

    For a training that grows, each stage is timed as well.

    Args:
        recipe: recipe to train.
        overrides: overridden keys of the recipe.
        rounds: number of intervals of the Trainer and of the bare loop.
        steps: training steps per interval.
        as_json: print JSON instead of a table.
        started: `time.perf_counter()` at the start of the command.

    Raises:
        UserError: the recipe has no training, or its datamodule has no PIL baseline.
    """
    if "total_images" not in parameters(recipe.class_path("model")):
        raise UserError(f"{recipe.name} has nothing to train. Choose a recipe with training")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DARKROOM_RUNS"] = folder
        cli = build_cli("fit", recipe, ["--run", "bench", "--trainer.devices", "1", *overrides])
        task = task_of(cli.datamodule)
        if task.baseline is None or task.bench_inference is None:
            raise UserError(f"{recipe.name}: there is no baseline for {type(cli.datamodule).__name__}. Choose another recipe")
        skip_to_last_stage(cli)
        timer = InterleavedTimer(cli.model, cli.datamodule, steps, started)
        train_without_eval(cli, steps * (rounds + 1), timer)
    method = cli.model.cpu().eval()
    results = {**bench_training(timer, cli), **task.bench_inference(method, cli.datamodule)}
    stages = bench_stages(timer.methods["bare"], cli.datamodule, steps, cli.trainer.precision_plugin.forward_context)
    if stages:
        results["stages"] = stages
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        print_results(recipe, results)


def pil_batches(data: Any, device: torch.device) -> Iterator[Batch]:
    """Yield batches of single items without end, with one loader worker per CPU core."""
    baseline = task_of(data).baseline
    assert baseline is not None
    size = data.batch_size_at(data.position())
    items = baseline(data)
    loader = DataLoader(
        items,
        size,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
        collate_fn=getattr(items, "collate", None),  # for images of different sizes
    )
    while True:
        for batch in loader:
            yield map_tensors(batch, lambda tensor: tensor.to(device))


class InterleavedTimer(Callback):
    """Callback that alternates intervals of the Trainer with intervals of the bare loop and of the PIL loop.

    Args:
        method: the method that the Trainer trains; the other loops train copies of it.
        data: datamodule of the Trainer.
        steps: training steps per interval.
        command_started: `time.perf_counter()` at the start of the command.
    """

    def __init__(self, method: Method, data: Any, steps: int, command_started: float) -> None:
        self.steps, self.data, self.command_started = steps, data, command_started
        self.methods = {"bare": deepcopy(method), "pil": deepcopy(method)}
        self.loops: dict[str, Step] = {}
        self.milliseconds: dict[str, list[float]] = {"ours": [], "bare": [], "pil": []}  # per step, one value per interval
        self.before_pil: list[float] = []  # the Trainer's interval before each PIL interval, in milliseconds per step
        self.started = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At the end of an interval, record its time, run the other loops and restart the clock."""
        if batch_idx == 0:
            self.seconds_to_first_step = time.perf_counter() - self.command_started
            precision, device = trainer.precision_plugin.forward_context, pl_module.device
            for name, method in self.methods.items():
                method.setup("fit")
                method.to(device)
                batches = bare_batches(self.data, method) if name == "bare" else pil_batches(self.data, device)
                self.loops[name] = make_reference_step(method, batches, make_optimizers(method), precision)
        if (batch_idx + 1) % self.steps:
            return
        synchronize(pl_module.device)
        stretch = (batch_idx + 1) // self.steps - 1  # interval 0 is the warm-up
        ours = 1000 * (time.perf_counter() - self.started) / self.steps
        bare = self.run("bare", self.steps, pl_module.device)
        if stretch > 0:
            self.milliseconds["ours"].append(ours)
            self.milliseconds["bare"].append(bare)
        if stretch % PIL_EVERY == 0:
            pil = self.run("pil", PIL_EVERY * self.steps, pl_module.device)
            if stretch > 0:
                self.milliseconds["pil"].append(pil)
                self.before_pil.append(ours)
            time.sleep(SETTLE)
        self.started = time.perf_counter()

    def run(self, name: str, steps: int, device: torch.device) -> float:
        """Run one of the loops and return its milliseconds per step."""
        started = time.perf_counter()
        for _ in range(steps):
            self.loops[name]()
        synchronize(device)
        return 1000 * (time.perf_counter() - started) / steps


def step_breakdown(method: Method, data: Any, steps: int, precision: Precision) -> dict[str, float]:
    """Return the milliseconds that a bare step spends on data, on the optimizers and on the networks (the remainder)."""
    spent = {"data_ms": 0.0, "network_ms": 0.0, "optimizer_ms": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            synchronize(method.device)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(method.device)
            spent[name] += 1000 * (time.perf_counter() - started) / steps
            return result

        return wrapper

    batches = bare_batches(data, method)
    next_batch = timed("data_ms", lambda: next(batches))
    optimizers = {
        name: SimpleNamespace(param_groups=o.param_groups, zero_grad=o.zero_grad, step=timed("optimizer_ms", o.step))
        for name, o in make_optimizers(method).items()
    }
    step = make_reference_step(method, iter(next_batch, None), optimizers, precision)
    for _ in range(10):
        step()
    spent.update(dict.fromkeys(spent, 0.0))
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(method.device)
    spent["network_ms"] = 1000 * (time.perf_counter() - started) / steps - spent["data_ms"] - spent["optimizer_ms"]
    return spent


def bench_training(timer: InterleavedTimer, cli: DarkroomCLI) -> dict[str, Any]:
    """Return rates as medians over intervals, and ratios as medians and quartiles over adjacent intervals."""
    spent = timer.milliseconds
    batch_size = cli.model.stage_plan.batch_sizes[-1]
    rate = {name: 1000 * batch_size / statistics.median(values) for name, values in spent.items()}
    to_bare = [bare / ours for ours, bare in zip(spent["ours"], spent["bare"], strict=True)]
    to_pil = [pil / ours for ours, pil in zip(timer.before_pil, spent["pil"], strict=True)]
    extra = [ours - bare for ours, bare in zip(spent["ours"], spent["bare"], strict=True)]
    # The bare loop's method is still on the device of the training; the Trainer has moved its own to the CPU.
    device, precision = timer.methods["bare"].device, cli.trainer.precision_plugin.forward_context
    breakdown = step_breakdown(timer.methods["bare"], cli.datamodule, 10 * timer.steps, precision)
    pil_ms = statistics.median(spent["pil"])
    gflops = rate["ours"] * count_flops(timer.loops["bare"]) / batch_size / 1e9
    peak = convolution_peak(device, precision)
    return {
        "recipe": cli.recipe.name,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "pairs": len(to_bare),
        "images_per_second": rate["ours"],
        "images_per_second_bare": rate["bare"],
        "images_per_second_pil": rate["pil"],
        "ratio_to_bare": statistics.median(to_bare),
        "ratio_to_bare_quartiles": quartiles(to_bare),
        "ratio_to_pil": statistics.median(to_pil),
        "ratio_to_pil_quartiles": quartiles(to_pil),
        "step_ms": statistics.median(spent["ours"]),
        "extra_ms_per_step": statistics.median(extra),
        "extra_ms_per_step_quartiles": quartiles(extra),
        **breakdown,
        "ratio_to_pil_without_overhead": pil_ms / (breakdown["network_ms"] + breakdown["optimizer_ms"]),
        "gflops": gflops,
        "peak_gflops": peak,
        "share_of_peak": gflops / peak,
        "peak_memory_mib": peak_memory_mib(cli.trainer),
        "seconds_to_first_step": timer.seconds_to_first_step,
    }


def convolution_peak(device: torch.device, precision: Precision) -> float:
    """Return the GFLOP/s of the fastest of ten forward passes of a 3 x 3 convolution with 64 input and output channels."""
    layer = torch.nn.Conv2d(64, 64, 3).to(device).to(memory_format=torch.channels_last)
    image = torch.rand(8, 64, 130, 130, device=device).to(memory_format=torch.channels_last)
    times = []
    with torch.no_grad():
        for _ in range(10):
            started = time.perf_counter()
            with precision():
                layer(image)
            synchronize(device)
            times.append(time.perf_counter() - started)
    return 2 * 8 * 64 * 64 * 9 * 128 * 128 / min(times) / 1e9


def print_results(recipe: Recipe, results: dict[str, Any]) -> None:
    """Print the results as a table, with an explanation of the remaining overhead."""
    stages = results.pop("stages", [])
    table = Table("result", "value", title=f"{recipe.name} on {results['hardware']}", title_justify="left")
    for name, value in results.items():
        text = " ... ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else value
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(text))
    console = Console()
    console.print(table)
    console.print(
        "Remaining differences. Bare loop: the Trainer's hooks and counters take {extra_ms_per_step:.2f} ms per step. PIL "
        "loop: the network and its optimizer take {0:.1f} of the {step_ms:.1f} ms per step. Without the time for data and the "
        "Trainer, the rate would be {ratio_to_pil_without_overhead:.1f} times that of the PIL loop. Peak: images are small, "
        "channels are few, and the optimizer's {optimizer_ms:.1f} ms contain no counted operations.".format(
            results["network_ms"] + results["optimizer_ms"], **results
        )
    )
    if stages:
        print_stages(stages, console)
