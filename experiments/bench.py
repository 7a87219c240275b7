"""`darkroom bench`: how fast training is, beside a bare PyTorch loop and beside one whose loader makes item by item by PIL."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from callbacks.run_record import cpu_name, peak_memory_mib
from datamodules.catalogue import MissingData
from datamodules.generation import Generation
from datamodules.pairs import Pictures
from datamodules.pictures import pictures_of
from datamodules.refused import Refused
from datamodules.segmentation import Segmentation
from datamodules.superresolution import SuperResolution
from experiments.cli import DarkroomCLI, build
from experiments.complaints import parameters
from experiments.fit import alone, loggers, prepare, settle_memory
from experiments.pil_loaders import pil_batches
from experiments.recipes import Recipe
from modules.generative import GenerativeMethod
from modules.method import Method
from modules.phases import Batch, Player, only, size_of
from modules.segmentation import SegmentationMethod
from modules.srcnn import SRCNN

Step = Callable[[], None]
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
    if "images" not in parameters(recipe.class_path("model")):
        raise Refused(f"{recipe.name} has nothing to train, and so nothing to time")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DARKROOM_RUNS"] = folder
        cli = build("fit", recipe, ["--run", "bench", "--trainer.devices", "1"])
        if not isinstance(cli.datamodule, SuperResolution | Generation | Segmentation):
            raise Refused(f"{recipe.name} is a toy; bench times methods that make, enlarge or segment images")
        cli.model.images = cli.datamodule.batch_size * steps * (pairs + 1)
        cli.trainer.limit_val_batches = 0
        cli.trainer.num_sanity_val_steps = 0
        stopwatch = Stopwatch(cli.model, cli.datamodule, steps, started)
        cli.trainer.callbacks.append(stopwatch)
        with alone(cli, cli.run):
            cli.trainer.loggers = loggers(cli, cli.run, prepare(cli, cli.run)[0])
            settle_memory()
            cli.trainer.fit(cli.model, cli.datamodule)
    method = cli.model.cpu().eval()
    figures = {**training_figures(stopwatch, cli), **use_figures(method, cli.datamodule)}
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        show(recipe, figures)


class Stopwatch(Callback):
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


def loop(method: Method, batches: Iterator[Batch], optimizers: Sequence[Any]) -> Step:
    """A training step as one would write it by hand: each network's optimizer in turn, the other networks frozen."""
    players = [Player(*pair) for pair in zip(method.phases(), optimizers, strict=True)]
    seen = turn = 0

    def step() -> None:
        nonlocal seen, turn
        batch = next(batches)
        size = size_of(batch)
        turn += 1
        moving = [player for player in players if not turn % player.phase.every]
        for player in moving:
            for repetition in range(player.phase.times):
                if player is moving[0] or repetition:
                    with only([player] if repetition else moving, players):
                        joined = {**batch, "positions": range(seen, seen + size), "repetition": repetition}
                        joined.update(method.shared(joined))
                with only([player], players):
                    for group in player.optimizer.param_groups:
                        group.update(player.phase.schedule(seen))
                    player.optimizer.zero_grad()
                    torch.stack(list(player.phase.losses(joined).values())).sum().backward()
                    if player.phase.clip is not None:
                        torch.nn.utils.clip_grad_norm_(player.parameters, player.phase.clip)
                    player.optimizer.step()
        seen += size

    return step


def optimizers_of(method: Method) -> list[Any]:
    """New ones, of a method that may have but one."""
    found = method.configure_optimizers()
    return found if isinstance(found, list) else [found]


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


def bare_batches(data: Any, device: torch.device) -> Iterator[Batch]:
    """Our batches, without a Trainer."""
    data = copy(data)  # whose position in the stream is its own
    for batch in data.train_dataloader():
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        yield data.on_after_batch_transfer(moved, 0)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_figures(stopwatch: Stopwatch, cli: DarkroomCLI) -> dict[str, Any]:
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


def quartiles(values: list[float]) -> list[float]:
    """The lower and the upper one."""
    if len(values) < 2:
        return values * 2
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def flops_of(work: Callable[[], Any]) -> int:
    """Floating-point operations of some work, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


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


def use_figures(method: Method, data: Any) -> dict[str, Any]:
    """What the trained network's work costs, by its kind."""
    if isinstance(method, GenerativeMethod):
        return sampling_figures(method)
    return segmentation_figures(method, data) if isinstance(method, SegmentationMethod) else inference_figures(method)


def segmentation_figures(method: SegmentationMethod, data: Segmentation) -> dict[str, Any]:
    """Millions of pixels segmented a second, over the pictures that choose the checkpoint, in one view each."""
    method.symmetries = 1
    data.setup("validate")
    pictures = [data.val_pictures[i]["image"].float() / 255 for i in range(min(5, len(data.val_pictures)))]
    pixels = sum(picture.shape[-1] * picture.shape[-2] for picture in pictures)
    times = []
    with torch.no_grad():
        for _ in range(4):  # the first one warms up
            started = time.perf_counter()
            for picture in pictures:
                method.predict_step({"image": picture}, 0)
            times.append(time.perf_counter() - started)
    return {"megapixels_per_second": pixels / statistics.median(times[1:]) / 1e6}


def sampling_figures(method: GenerativeMethod) -> dict[str, Any]:
    """Images made a second, 64 at once."""
    latents = method.latents(range(64))
    times = []
    with torch.no_grad():
        for _ in range(6):  # the first one warms up
            started = time.perf_counter()
            method.sample(latents)
            times.append(time.perf_counter() - started)
    return {"samples_per_second": 64 / statistics.median(times[1:])}


def inference_figures(method: Any) -> dict[str, Any]:
    """Milliseconds to enlarge a picture, mean over Set14 (else the embedded test photographs), and SRCNN 9-5-5 beside it."""
    name = "set14"
    try:
        found = pictures_of(name)
    except MissingData:
        name = "photographs/test"
        found = pictures_of(name)
    pictures = Pictures(found, method.scale)
    lows = [pictures[i]["input"] for i in range(len(pictures))]
    networks = (method, SRCNN(method.scale, "9-5-5").eval())
    ours, srcnn = (_milliseconds(network, lows) for network in networks)
    flops, flops_srcnn = (flops_of(partial(network, lows[0])) for network in networks)
    return {
        "inference_set": name,
        "inference_ms": ours,
        "inference_ms_srcnn": srcnn,
        "srcnn_to_ours": srcnn / ours,
        "srcnn_to_ours_flops": flops_srcnn / flops,
        "srcnn_to_ours_theory": 2.5 * method.scale**2,  # ESPCN paper, Section 1
    }


def _milliseconds(network: Any, lows: list[Tensor]) -> float:
    per_picture = []
    with torch.no_grad():
        for low in lows:
            times = []
            for _ in range(4):  # the first one warms up
                started = time.perf_counter()
                network(low)
                times.append(time.perf_counter() - started)
            per_picture.append(1000 * statistics.median(times[1:]))
    return statistics.fmean(per_picture)


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
