"""Cost of each stage of a training whose images grow."""

import time
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.bench.reference_loop import Precision, bare_batches, make_optimizers, make_reference_step
from experiments.bench.timing import count_flops, synchronize
from modules.training.method import Method

WARM_UP = 2  # steps of each stage


def bench_stages(method: Method, data: Any, steps: int, precision: Precision) -> list[dict[str, float]]:
    """Time the first steps of each stage in a bare loop; empty if all stages have images of the same size.

    Args:
        method: the method, after `setup`; it is trained.
        data: datamodule of its training images.
        steps: timed steps of each stage, at most.
        precision: context of the forward passes, such as autocast.

    Returns:
        For each stage: its first image, the images of its training, their side in pixels, the batch size, the milliseconds and
        the floating-point operations (in units of 10^6) for an image.
    """
    plan = method.plan_stages(data)
    if len({stage.image_size for stage in plan.stages}) == 1:
        return []
    rows = []
    for index, (start, end) in enumerate(pairwise([*plan.starts, method.total_images])):
        method.images_seen = start
        step = make_reference_step(method, bare_batches(data, method), make_optimizers(method), precision)
        for _ in range(WARM_UP):
            step()
        synchronize(method.device)
        started = time.perf_counter()
        timed = max(1, min(steps, (end - start) // plan.batch_sizes[index] - WARM_UP - 1))  # within the stage
        for _ in range(timed):
            step()
        synchronize(method.device)
        images = timed * plan.batch_sizes[index]
        rows.append(
            {
                "start": start,
                "images": end - start,
                "side": plan.stages[index].image_size or 0,
                "batch_size": plan.batch_sizes[index],
                "ms_per_image": 1000 * (time.perf_counter() - started) / images,
                "mflop_per_image": count_flops(step) / plan.batch_sizes[index] / 1e6,
            }
        )
    return rows


def print_stages(rows: list[dict[str, float]], console: Console) -> None:
    """Print the costs of stages, and compare the whole training with one at the size of the last stage."""
    table = Table("images from", "side", "batch size", "ms per image", "MFLOP per image", "GFLOP/s", title="stages")
    for row in rows:
        speed = row["mflop_per_image"] / row["ms_per_image"]
        table.add_row(
            f"{row['start']:,}",
            str(row["side"]),
            str(row["batch_size"]),
            f"{row['ms_per_image']:.3f}",
            f"{row['mflop_per_image']:,.1f}",
            f"{speed:,.1f}",
        )
    console.print(table)
    images = sum(row["images"] for row in rows)
    for name, unit, scale in (("ms_per_image", "h", 3.6e6), ("mflop_per_image", "TFLOP", 1e6)):
        total = sum(row["images"] * row[name] for row in rows)
        full = images * rows[-1][name]
        console.print(
            f"All {images:,} images: {total / scale:,.2f} {unit}, and {full / scale:,.2f} {unit} if all stages cost as much as "
            f"the last one ({full / total:.2f} times)."
        )
