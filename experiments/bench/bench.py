"""`darkroom bench`: how fast training is, beside a bare PyTorch loop and beside one whose loader makes item by item by PIL."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from callbacks.run.run_record import cpu_name, peak_memory_mib
from datamodules.errors import UserError
from datamodules.generation import Generation
from datamodules.segmentation import Segmentation
from datamodules.superresolution import SuperResolution
from datamodules.unpaired import Unpaired
from experiments.bench.inference import use_figures
from experiments.bench.pil_baselines import pil_batches
from experiments.bench.reference_loop import Step, bare_batches, flops_of, loop, optimizers_of, quartiles, wait
from experiments.cli.errors import parameters
from experiments.run.fit import train_alone
from experiments.run.lightning_cli import DarkroomCLI, build
from experiments.run.recipes import Recipe
from modules.training.method import Method

PIL_EVERY = 6  # pairs; its stretches are as much longer, since its workers have a few batches ready when one begins
SETTLE = 0.5  # seconds: the PIL-fed loader's workers fill their queue again, and must not do it on our time


def bench(recipe: Recipe, pairs: int, steps: int, as_json: bool, started: float) -> None:
    """Time training in interleaved stretches, and one enlargement; print the figures by name.

    Args:
        recipe: what to train.
        pairs: stretches of each kind.
        steps: training steps in a stretch.
        as_json: print JSON instead of a table.
        started: `time.perf_counter()` when the command began.
    """
    if "total_images" not in parameters(recipe.class_path("model")):
        raise UserError(f"{recipe.name} has nothing to train, and so nothing to time")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DARKROOM_RUNS"] = folder
        cli = build("fit", recipe, ["--run", "bench", "--trainer.devices", "1"])
        if not isinstance(cli.datamodule, SuperResolution | Generation | Segmentation | Unpaired):
            raise UserError(f"{recipe.name} is a toy; bench times methods that make, enlarge, segment or translate images")
        stopwatch = InterleavedTimer(cli.model, cli.datamodule, steps, started)
        train_alone(cli, steps * (pairs + 1), stopwatch)
    method = cli.model.cpu().eval()
    figures = {**training_figures(stopwatch, cli), **use_figures(method, cli.datamodule)}
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        show(recipe, figures)


class InterleavedTimer(Callback):
    """Interleaves stretches of the Trainer's training with stretches of a bare loop and of a PIL-fed one.

    Args:
        method: the method under the Trainer; copies of it train in the loops.
        data: its data.
        steps: of a stretch.
        begun: when the command began.
    """

    def __init__(self, method: Method, data: Any, steps: int, begun: float) -> None:
        self.steps, self.data, self.begun = steps, data, begun
        self.methods = {"bare": deepcopy(method), "pil": deepcopy(method)}
        self.loops: dict[str, Step] = {}
        self.milliseconds: dict[str, list[float]] = {"ours": [], "bare": [], "pil": []}  # a step, stretch by stretch
        self.beside_pil: list[float] = []  # ours, just before each stretch of the PIL-fed loop
        self.started = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At the end of a stretch, stop the clock, let the others run theirs, start it anew."""
        if batch_idx == 0:
            self.seconds_to_first_step = time.perf_counter() - self.begun
            self.loops = {
                name: loop(method.to(pl_module.device), batches(self.data, pl_module.device), optimizers_of(method))
                for (name, method), batches in zip(self.methods.items(), (bare_batches, pil_batches), strict=True)
            }
        if (batch_idx + 1) % self.steps:
            return
        wait(pl_module.device)
        stretch = (batch_idx + 1) // self.steps - 1  # number 0 warms up
        ours = 1000 * (time.perf_counter() - self.started) / self.steps
        bare = self.run("bare", self.steps, pl_module.device)
        if stretch > 0:
            self.milliseconds["ours"].append(ours)
            self.milliseconds["bare"].append(bare)
        if stretch % PIL_EVERY == 0:
            pil = self.run("pil", PIL_EVERY * self.steps, pl_module.device)
            if stretch > 0:
                self.milliseconds["pil"].append(pil)
                self.beside_pil.append(ours)
            time.sleep(SETTLE)
        self.started = time.perf_counter()

    def run(self, name: str, steps: int, device: torch.device) -> float:
        """Milliseconds a step of one of the loops."""
        started = time.perf_counter()
        for _ in range(steps):
            self.loops[name]()
        wait(device)
        return 1000 * (time.perf_counter() - started) / steps


def parts(method: Method, data: Any, steps: int) -> dict[str, float]:
    """Where a bare step's time goes: milliseconds for data, for the optimizers, and for the networks, the rest."""
    spent = {"data_ms": 0.0, "network_ms": 0.0, "optimizer_ms": 0.0}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*inputs: Any, **named: Any) -> Any:
            wait(method.device)
            begun = time.perf_counter()
            result = work(*inputs, **named)
            wait(method.device)
            spent[name] += 1000 * (time.perf_counter() - begun) / steps
            return result

        return measured

    batches = bare_batches(data, method.device)
    following = timed("data_ms", lambda: next(batches))
    optimizers = [
        SimpleNamespace(param_groups=o.param_groups, zero_grad=o.zero_grad, step=timed("optimizer_ms", o.step))
        for o in optimizers_of(method)
    ]
    step = loop(method, iter(following, None), optimizers)
    for _ in range(10):
        step()
    spent.update(dict.fromkeys(spent, 0.0))
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    wait(method.device)
    spent["network_ms"] = 1000 * (time.perf_counter() - begun) / steps - spent["data_ms"] - spent["optimizer_ms"]
    return spent


def training_figures(stopwatch: InterleavedTimer, cli: DarkroomCLI) -> dict[str, Any]:
    """Rates are medians over the stretches, ratios medians over pairs of neighbours with their quartiles."""
    spent = stopwatch.milliseconds
    rate = {name: 1000 * cli.datamodule.batch_size / statistics.median(values) for name, values in spent.items()}
    to_bare = [bare / ours for ours, bare in zip(spent["ours"], spent["bare"], strict=True)]
    to_pil = [pil / ours for ours, pil in zip(stopwatch.beside_pil, spent["pil"], strict=True)]
    extra = [ours - bare for ours, bare in zip(spent["ours"], spent["bare"], strict=True)]
    device = cli.model.device
    shares = parts(stopwatch.methods["bare"], cli.datamodule, 10 * stopwatch.steps)
    pil_ms = statistics.median(spent["pil"])
    gflops = rate["ours"] * flops_of(stopwatch.loops["bare"]) / cli.datamodule.batch_size / 1e9
    peak = convolution_peak(device)
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
        **shares,
        "ratio_to_pil_without_overhead": pil_ms / (shares["network_ms"] + shares["optimizer_ms"]),
        "gflops": gflops,
        "peak_gflops": peak,
        "share_of_peak": gflops / peak,
        "peak_memory_mib": peak_memory_mib(cli.trainer),
        "seconds_to_first_step": stopwatch.seconds_to_first_step,
    }


def convolution_peak(device: torch.device) -> float:
    """GFLOP/s of the fastest of ten forward passes of a convenient convolution, 64 to 64 channels, 3 x 3."""
    layer = torch.nn.Conv2d(64, 64, 3).to(device).to(memory_format=torch.channels_last)
    image = torch.rand(8, 64, 130, 130, device=device).to(memory_format=torch.channels_last)
    times = []
    with torch.no_grad():
        for _ in range(10):
            started = time.perf_counter()
            layer(image)
            wait(device)
            times.append(time.perf_counter() - started)
    return 2 * 8 * 64 * 64 * 9 * 128 * 128 / min(times) / 1e9


def show(recipe: Recipe, figures: dict[str, Any]) -> None:
    """The figures as a table."""
    table = Table("figure", "value", title=f"{recipe.name} on {figures['hardware']}", title_justify="left")
    for name, value in figures.items():
        shown = " ... ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else value
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(shown))
    console = Console()
    console.print(table)
    console.print(
        "What is left. Beside the bare loop: the Trainer's hooks and counters, {extra_ms_per_step:.2f} ms of Python a step. "
        "Beside the PIL-fed loop: the network and its optimizer take {0:.1f} of our {step_ms:.1f} ms, so that data for nothing "
        "would give {ratio_to_pil_without_overhead:.1f} times its rate. Beside the peak: small pictures and few channels; "
        "the optimizer's {optimizer_ms:.1f} ms do not count as the network's work.".format(
            figures["network_ms"] + figures["optimizer_ms"], **figures
        )
    )
