"""`darkroom bench`: compare training speed with a bare PyTorch loop, and with a PIL data loader that reads single items."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from callbacks.run.run_record import cpu_name, peak_memory_mib
from datamodules.errors import UserError
from experiments.bench.bench_report import print_results
from experiments.bench.feed import baseline_of, pil_loader
from experiments.bench.held_batch import HeldBatch
from experiments.bench.reference_loop import Precision, Step, bare_batches, make_optimizers, make_reference_step
from experiments.bench.stages import bench_stages
from experiments.bench.step_profile import StepProfile, StepProfiler
from experiments.bench.timing import Stopwatch, count_flops, matmul_gflops, quartiles, synchronize
from experiments.cli.errors import parameters
from experiments.run.fit import skip_to_last_stage, train_without_eval
from experiments.run.lightning_cli import DarkroomCLI, build_cli
from experiments.run.recipes import Recipe
from experiments.tasks.registry import task_of
from modules.training.method import Method
from modules.training.phases import Batch, map_tensors

PIL_EVERY = 6  # pairs per PIL interval; a PIL interval has this many times the steps, because workers prefetch some batches
SETTLE = 0.5  # seconds for the PIL loader's workers to refill their queue before the Trainer is timed again


def bench(recipe: Recipe, overrides: list[str], pairs: int, steps: int, as_json: bool, started: float) -> None:
    """Time the last stage of training in interleaved intervals, then inference, and print the results by name.

    For a training that grows, each stage is timed as well.

    Args:
        recipe: recipe to train.
        overrides: overridden keys of the recipe.
        pairs: number of pairs of an interval of the Trainer and one of the bare loop.
        steps: timed training steps per interval.
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
        baseline_of(cli.datamodule, recipe.name)
        skip_to_last_stage(cli)
        timer = InterleavedTimer(cli, pairs, steps, started)
        train_without_eval(cli, len(timer.intervals) * (steps + 1), timer)
    data = timer.held.original()
    inference = task_of(data).bench_inference
    results = bench_training(timer, cli, data)
    # The Trainer has moved its method to the CPU; that of the bare loop is still on the device of the training.
    method = cli.model.to(timer.methods["bare"].device).eval()
    speeds = {"inference_device": method.device.type, **inference(method, data)} if inference else {}
    stages = bench_stages(timer.methods["bare"], data, steps, timer.precision)
    if as_json:
        print(json.dumps({**results, **speeds, **({"stages": stages} if stages else {})}, indent=1))
    else:
        print_results(results, speeds, stages)


def plan_intervals(pairs: int) -> list[str]:
    """Return the kind of each interval of the Trainer.

    The kinds are "warm-up", "real" (one for each pair), "held", with one batch again and again, after every `PIL_EVERY` pairs,
    and "profile".
    """
    intervals = ["warm-up"]
    for pair in range(1, pairs + 1):
        intervals += ["real"] if pair % PIL_EVERY else ["real", "held"]
    return [*intervals, "profile"]


class InterleavedTimer(Callback):
    """Callback that alternates intervals of the Trainer with intervals of the bare loop and of the PIL loop.

    Each interval has an untimed step at its start, then `steps` steps.

    Args:
        cli: model, datamodule and trainer. The other loops train copies of the model; the loader of the datamodule is replaced.
        pairs: pairs of intervals of the Trainer and of the bare loop.
        steps: training steps per interval.
        command_started: `time.perf_counter()` at the start of the command.
    """

    def __init__(self, cli: DarkroomCLI, pairs: int, steps: int, command_started: float) -> None:
        self.cli, self.steps, self.command_started = cli, steps, command_started
        self.intervals = plan_intervals(pairs)
        self.methods: dict[str, Method] = {"bare": deepcopy(cli.model), "pil": deepcopy(cli.model)}
        self.held = HeldBatch(cli.datamodule)
        self.precision: Precision = cli.trainer.precision_plugin.forward_context
        self.loops: dict[str, Step] = {}
        self.milliseconds: dict[str, list[float]] = {name: [] for name in ("ours", "bare", "pil", "ours_held", "bare_held")}
        self.before_pil: list[float] = []  # the Trainer's interval before each PIL interval, in milliseconds per step
        self.profiles: dict[str, StepProfile] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Time or profile the steps of an interval; at its end, run the other loops."""
        interval, step = self.intervals[batch_idx // (self.steps + 1)], batch_idx % (self.steps + 1)
        if batch_idx == 0:
            self.seconds_to_first_step = time.perf_counter() - self.command_started
            self.watch, self.profiler = Stopwatch(pl_module.device), StepProfiler(pl_module.device)
        if interval == "profile":
            if step == 0:
                self.profiler.start()
            else:
                self.profiler.end_step()
            if step < self.steps:
                self.profiler.begin_step()
        elif step == 0:
            self.watch.start()
        if step == self.steps:
            self.end_interval(interval, batch)
            following = batch_idx // (self.steps + 1) + 1
            self.held.is_held = following < len(self.intervals) and self.intervals[following] == "held"

    def end_interval(self, interval: str, batch: Batch) -> None:
        """Record an interval of the Trainer, and run the bare loop, and after every `PIL_EVERY` pairs the PIL loop."""
        if interval == "profile":
            self.profiles["ours"] = self.profiler.stop()
            return
        ours = self.watch.stop() / self.steps
        if interval == "warm-up":
            self.peak_memory_mib = peak_memory_mib(self.cli.trainer)  # before the other loops allocate theirs
            self.held.batch = batch
            self.make_loops()
            for name in self.loops:
                self.run(name, self.steps)
            return
        kind = "_held" if interval == "held" else ""
        self.milliseconds[f"ours{kind}"].append(ours)
        self.milliseconds[f"bare{kind}"].append(self.run(f"bare{kind}", self.steps))
        if not kind and len(self.milliseconds["ours"]) % PIL_EVERY == 0:
            self.before_pil.append(ours)
            self.milliseconds["pil"].append(self.run("pil", PIL_EVERY * self.steps))
            time.sleep(SETTLE)

    def make_loops(self) -> None:
        """Make the steps of the other loops, with copies of the method before its first step."""
        device, data, name = self.cli.model.device, self.held.original(), self.cli.recipe.name
        for method in self.methods.values():
            method.setup("fit")
            self.cli.trainer.precision_plugin.convert_module(method).to(device)
            if self.cli.config.compile:
                method.compile_networks()
        bare, pil = self.methods["bare"], self.methods["pil"]
        pil_batches = (
            map_tensors(batch, lambda tensor: tensor.to(device)) for batch in pil_loader(data, name, os.cpu_count() or 1)
        )
        optimizers = make_optimizers(bare)
        self.loops = {
            "bare": make_reference_step(bare, bare_batches(data, bare), optimizers, self.precision),
            "bare_held": make_reference_step(bare, repeat(self.held.batch), optimizers, self.precision),
            "pil": make_reference_step(pil, pil_batches, make_optimizers(pil), self.precision),
        }

    def run(self, name: str, steps: int) -> float:
        """Run one of the loops and return its milliseconds per step, without the first step."""
        self.loops[name]()
        self.watch.start()
        for _ in range(steps):
            self.loops[name]()
        return self.watch.stop() / steps

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Profile the bare loop, while the networks are on the device."""
        self.profiles["bare"] = profile_steps(self.loops["bare"], self.steps, pl_module.device)


def profile_steps(step: Step, steps: int, device: torch.device) -> StepProfile:
    """Profile a number of calls of a training step, after one more."""
    step()
    profiler = StepProfiler(device)
    profiler.start()
    for _ in range(steps):
        profiler.begin_step()
        step()
        profiler.end_step()
    return profiler.stop()


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


def bench_training(timer: InterleavedTimer, cli: DarkroomCLI, data: Any) -> dict[str, Any]:
    """Return rates as medians over intervals, and ratios as medians and quartiles over adjacent intervals."""
    spent, batch_size = timer.milliseconds, cli.model.stage_plan.batch_sizes[-1]
    medians = {name: statistics.median(values) for name, values in spent.items()}
    rate = {name: 1000 * batch_size / value for name, value in medians.items()}
    to_bare = [bare / ours for ours, bare in zip(spent["ours"], spent["bare"], strict=True)]
    to_pil = [pil / ours for ours, pil in zip(timer.before_pil, spent["pil"], strict=True)]
    extra = [ours - bare for ours, bare in zip(spent["ours"], spent["bare"], strict=True)]
    device = timer.methods["bare"].device
    breakdown = step_breakdown(timer.methods["bare"], data, 10 * timer.steps, timer.precision)
    flops = count_flops(timer.loops["bare"])
    peak = matmul_gflops(device, timer.precision)
    ours, bare = timer.profiles["ours"], timer.profiles["bare"]
    return {
        "recipe": cli.recipe.name,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": device.type,
        "precision": str(cli.trainer.precision),
        "compiled": bool(cli.config.compile),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "pairs": len(to_bare),
        "step_ms": medians["ours"],
        "step_ms_bare": medians["bare"],
        "step_ms_pil": medians["pil"],
        "images_per_second": rate["ours"],
        "images_per_second_bare": rate["bare"],
        "images_per_second_pil": rate["pil"],
        "images_per_second_held": rate["ours_held"],
        "images_per_second_held_bare": rate["bare_held"],
        "ratio_to_bare": statistics.median(to_bare),
        "ratio_to_bare_quartiles": quartiles(to_bare),
        "ratio_to_pil": statistics.median(to_pil),
        "ratio_to_pil_quartiles": quartiles(to_pil),
        "extra_ms_per_step": statistics.median(extra),
        "extra_ms_per_step_quartiles": quartiles(extra),
        **profile_results(ours, medians["ours"], ""),
        **profile_results(bare, medians["bare"], "_bare"),
        **breakdown,
        "ratio_to_pil_without_overhead": medians["pil"] / (breakdown["network_ms"] + breakdown["optimizer_ms"]),
        "gflop_per_step": flops / 1e9,
        "gflops": flops / medians["ours"] / 1e6,
        "gflops_bare": flops / medians["bare"] / 1e6,
        "peak_gflops": peak,
        "share_of_peak": flops / medians["ours"] / 1e6 / peak,
        "share_of_peak_bare": flops / medians["bare"] / 1e6 / peak,
        "peak_memory_mib": timer.peak_memory_mib,
        "seconds_to_first_step": timer.seconds_to_first_step,
    }


def profile_results(found: StepProfile, step_ms: float, suffix: str) -> dict[str, float | None]:
    """Return the figures of a profile by name, see `StepProfile`.

    Args:
        found: profile of a training step.
        step_ms: milliseconds of a step without the profiler.
        suffix: end of the names.
    """
    figures = {
        "busy_share": found.busy_share(step_ms),
        "launch_ms": found.launch_ms,
        "operators": found.operators,
        "kernels": found.kernels,
        "copies": found.copies,
        "waits": found.waits,
    }
    return {f"{name}{suffix}": value for name, value in figures.items()}
