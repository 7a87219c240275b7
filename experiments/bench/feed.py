"""`darkroom bench --feed`: images a second that a datamodule yields without a network, next to a PIL loader."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from callbacks.run.run_record import cpu_name
from datamodules.errors import UserError
from experiments.bench.reference_loop import bare_batches
from experiments.bench.timing import quartiles
from experiments.run.fit import skip_to_last_stage
from experiments.run.lightning_cli import build_cli
from experiments.run.recipes import Recipe
from experiments.tasks.registry import task_of
from modules.training.phases import Batch, batch_size_of

# A recipe for each task, with data that are part of the repository.
FEED_RECIPES = (
    "espcn/demo",
    "unet/demo",
    "deeplab/demo",
    "mask_rcnn/demo",
    "cyclegan/demo",
    "gan/demo",
    "vae/demo",
    "style/demo",
    "colorization/demo",
)
SECONDS = 0.4  # of an interval; it has at least one batch


def bench_feed(recipes: Sequence[Recipe], overrides: list[str], pairs: int, as_json: bool) -> None:
    """Time the training batches of datamodules on the host, in one process, and print the results.

    Args:
        recipes: recipes with the datamodules.
        overrides: overridden keys of each recipe.
        pairs: interleaved pairs of an interval of the datamodule and one of the PIL loader.
        as_json: print JSON instead of a table.

    Raises:
        UserError: a datamodule has no PIL loader.
    """
    results = [feed_rates(recipe, overrides, pairs) for recipe in recipes]
    if as_json:
        print(json.dumps(results, indent=1))
        return
    title = f"Training images a second without a network, {cpu_name()}, {pairs} pairs"
    table = Table("recipe", "datamodule", title=title, title_justify="left")
    for name in ("ours", "PIL", "ratio", "quartiles"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(
            *(row["recipe"], row["datamodule"]),
            *(f"{row['images_per_second']:,.0f}", f"{row['images_per_second_pil']:,.0f}"),
            *(f"{row['ratio']:.1f}", "-".join(f"{value:.3g}" for value in row["ratio_quartiles"])),
        )
    console = Console(width=80)
    console.print(table)
    console.print("One process and no loader workers for both. The PIL loader reads and transforms single items.")


def feed_rates(recipe: Recipe, overrides: list[str], pairs: int) -> dict[str, Any]:
    """Return the rates of a recipe's datamodule and of its PIL loader as medians, and their ratio with quartiles."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DARKROOM_RUNS"] = folder
        cli = build_cli("fit", recipe, ["--run", "feed", "--trainer.accelerator", "cpu", *overrides])
        data = cli.datamodule
        skip_to_last_stage(cli)
        data.setup("fit")
        streams = [bare_batches(data, cli.model), pil_loader(data, recipe.name)]
        rates: list[list[float]] = [[], []]
        for pair in range(pairs + 1):  # the first one is a warm-up
            for stream, values in zip(streams, rates, strict=True):
                rate = images_per_second(stream, SECONDS)
                if pair:
                    values.append(rate)
    ratios = [ours / pil for ours, pil in zip(*rates, strict=True)]
    return {
        "recipe": recipe.name,
        "datamodule": type(data).__name__,
        "batch_size": data.batch_size_at(data.position()),
        "images_per_second": statistics.median(rates[0]),
        "images_per_second_pil": statistics.median(rates[1]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
    }


def images_per_second(batches: Iterator[Batch], seconds: float) -> float:
    """Return the images a second that an iterator yields, over at least `seconds` and one batch."""
    images, started = 0, time.perf_counter()
    while True:
        images += batch_size_of(next(batches))
        if (spent := time.perf_counter() - started) >= seconds:
            return images / spent


def pil_loader(data: Any, name: str, num_workers: int = 0) -> Iterator[Batch]:
    """Yield batches of single items, see `Task.baseline`, without end.

    Args:
        data: datamodule, after `setup`.
        name: name of the recipe.
        num_workers: loader processes.

    Raises:
        UserError: the task has no such items.
    """
    baseline = baseline_of(data, name)
    items = baseline(data)
    loader = DataLoader(
        items,
        data.batch_size_at(data.position()),
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=getattr(items, "collate", None),  # for images of different sizes
    )

    def batches() -> Iterator[Batch]:
        while True:
            yield from loader

    return batches()


def baseline_of(data: Any, name: str) -> Callable[[Any], torch.utils.data.Dataset[Any]]:
    """Return the function that makes the PIL items of a datamodule's task.

    Raises:
        UserError: there is none.
    """
    baseline = task_of(data).baseline
    if baseline is None:
        raise UserError(f"{name}: there is no baseline for {type(data).__name__}. Choose another recipe")
    return baseline
