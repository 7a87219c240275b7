"""`darkroom style-speed` and `style-objective`: a style network compared with optimization of the image.

J. Johnson, A. Alahi, L. Fei-Fei. ECCV 2016. arXiv:1603.08155, Table 1 and Figure 5.
"""

import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from callbacks.run.run_record import cpu_name
from datamodules.errors import UserError
from datamodules.io.image_refs import ImageRef, list_image_refs
from datamodules.io.paths import file_hash, find_file
from datamodules.photographs import read_resized
from datamodules.stylization import Stylization
from experiments.bench import style_report
from experiments.bench.timing import synchronize
from experiments.results.records import commit
from experiments.run.lightning_cli import DarkroomCLI, build_cli
from experiments.run.recipes import Recipe
from experiments.run.sample import require_writable
from experiments.run.weights import load_resolved_weights
from modules.neural_style import StyleOptimization
from modules.style_transfer import StyleTransfer, read_style

SIZES = (256, 512, 1024)  # pixels
FULL_RUN_SIZE = 256  # largest size at which all iterations are run
ITERATIONS = 500  # of a whole run
TIMED_ITERATIONS = 20  # of the other sizes; the rest is extrapolated
WARM_UP = 2  # iterations and forward passes
PASSES = 10  # timed forward passes
PHOTOGRAPHS = "photographs/test"


def speed(recipe: Recipe, overrides: list[str], write: bool) -> None:
    """Time forward passes and iterations of L-BFGS in one run, and print Table 1.

    The weights of the style network are random, because they do not influence the time.

    Args:
        recipe: recipe of the network and the losses.
        overrides: overridden keys of the recipe.
        write: save the record, and render the page of the comparison.

    Raises:
        UserError: the recipe is not a style transfer, or its style image or feature network is missing.
    """
    if write:
        require_writable(style_report.FOLDER)
    cli, method = _build(recipe, overrides)
    device = cli.trainer.strategy.root_device
    record: dict[str, Any] = {
        **_metadata(cli, recipe, "style-speed", overrides),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "sizes": {},
    }
    for size in SIZES:
        image = _photograph(list_image_refs(PHOTOGRAPHS)[0], size).to(device)
        network = _time_network(method, image)
        iterations = ITERATIONS if size <= FULL_RUN_SIZE else TIMED_ITERATIONS
        seconds = _time_optimization(method, image, iterations)
        record["sizes"][str(size)] = {"network": network, "iterations": seconds}
        print(f"{size} x {size}: network {network:.3g} s, {len(seconds)} iterations {sum(seconds):.3g} s", flush=True)
    Console().print(Markdown(style_report.render_speed(record)))
    style_report.save("speed", record, write)


def objective(recipe: Recipe, ckpt: str | None, overrides: list[str], write: bool) -> None:
    """Compare the objective of a trained network with that of L-BFGS by iterations, and print Figure 5.

    Args:
        recipe: recipe of the network and the losses.
        ckpt: weights file of the network; None for those of the newest run or the committed ones.
        overrides: overridden keys of the recipe.
        write: save the record and the figure, and render the page of the comparison.

    Raises:
        UserError: see `speed`; or the network has no weights.
    """
    if write:
        require_writable(style_report.FOLDER)
    words = [*overrides, *(["--ckpt", ckpt] if ckpt else [])]
    cli, method = _build(recipe, words)
    weights = load_resolved_weights(cli)
    method = method.to(cli.trainer.strategy.root_device).eval()
    curves = {ref.name: _curve(method, ref) for ref in list_image_refs(PHOTOGRAPHS)}
    record = {
        **_metadata(cli, recipe, "style-objective", words),
        "weights": file_hash(weights) if weights else "",
        "style": method.style_names[0],
        "size": FULL_RUN_SIZE,
        "photographs": curves,
    }
    Console().print(Markdown(style_report.render_objective(record)))
    style_report.save("objective", record, write)


def _curve(method: StyleTransfer, ref: ImageRef) -> dict[str, Any]:
    """Return the objective of a photograph, of the output of the network, and of each iteration of L-BFGS."""
    image = _photograph(ref, FULL_RUN_SIZE).to(method.device)
    values: list[float] = []
    optimization = _optimization(method, image)
    optimization.run(ITERATIONS, lambda step, value: values.append(value))
    if not values:
        raise UserError(f"L-BFGS cannot lower the objective of {ref.name}. Use a larger model.style_weight")
    with torch.no_grad():
        prediction = method.stylize(image, method.mixture_of([0])).clamp(0, 1)
    content, network = (optimization.value_and_gradient(picture)[0] for picture in (image, prediction))
    print(f"{ref.name}: network {network:.5g}, {len(values)} iterations {values[-1]:.5g}", flush=True)
    return {"content": content, "network": network, "iterations": values}


def _build(recipe: Recipe, overrides: list[str]) -> tuple[DarkroomCLI, StyleTransfer]:
    cli = build_cli("test", recipe, overrides)
    if not isinstance(cli.datamodule, Stylization) or not isinstance(cli.model, StyleTransfer):
        raise UserError(f"{recipe.name} is not a style transfer. Choose a recipe of darkroom list style")
    cli.model.to(cli.trainer.strategy.root_device)
    cli.model.compute_target_grams()
    return cli, cli.model


def _metadata(cli: DarkroomCLI, recipe: Recipe, command: str, overrides: list[str]) -> dict[str, Any]:
    model = cli.model.hparams
    return {
        "command": " ".join(["darkroom", command, recipe.name, *overrides]),
        "commit": commit(),
        "feature_network": model["feature_network"],
        "base_channels": model["base_channels"],
        "norm": model["norm"],
        "upsampling": model["upsampling"],
    }


def _photograph(ref: ImageRef, size: int) -> Tensor:
    """Return the central square of a photograph: (1, 3, size, size)."""
    image = read_resized(ref.path, size)
    top, left = ((side - size) // 2 for side in image.shape[-2:])
    return image[None, :, top : top + size, left : left + size] / 255


def _optimization(method: StyleTransfer, image: Tensor) -> StyleOptimization:
    style = read_style(find_file(method.styles[0], "model.styles"), method.style_size).to(image)
    return StyleOptimization(method.perceptual, image, style, image, "lbfgs")


def _time_network(method: StyleTransfer, image: Tensor) -> float:
    """Return the median duration of a forward pass in seconds."""
    method.eval()
    mixture, times = method.mixture_of([0]), []
    with torch.no_grad():
        for i in range(WARM_UP + PASSES):
            started = time.perf_counter()
            method(image, mixture)
            synchronize(image.device)
            if i >= WARM_UP:
                times.append(time.perf_counter() - started)
    return statistics.median(times)


def _time_optimization(method: StyleTransfer, image: Tensor, iterations: int) -> list[float]:
    """Return the duration of each iteration of L-BFGS in seconds, after a warm-up."""
    _optimization(method, image).run(WARM_UP, lambda step, value: None)
    optimization = _optimization(method, image)
    ends = [time.perf_counter()]
    optimization.run(iterations, lambda step, value: ends.append(time.perf_counter()))
    if len(ends) == 1:
        raise UserError("L-BFGS cannot lower the objective of the photograph. Use a larger model.style_weight")
    return [end - start for start, end in pairwise(ends)]
