"""Tables of `darkroom bench`, 80 columns wide."""

from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.bench.stages import print_stages

WIDTH = 80
# Row, decimals, and the names of the figures of the Trainer, the bare loop and the PIL loop.
ROWS = (
    ("step, ms", 2, ("step_ms", "step_ms_bare", "step_ms_pil")),
    ("images a second, real data", 1, ("images_per_second", "images_per_second_bare", "images_per_second_pil")),
    ("images a second, one batch held", 1, ("images_per_second_held", "images_per_second_held_bare")),
    ("busy share of a step [1]", 3, ("busy_share", "busy_share_bare")),
    ("host ms before the first kernel [2]", 3, ("launch_ms", "launch_ms_bare")),
    ("operators a step", 1, ("operators", "operators_bare")),
    ("kernels a step", 1, ("kernels", "kernels_bare")),
    ("copies to the device a step", 1, ("copies", "copies_bare")),
    ("synchronizations a step [3]", 1, ("waits", "waits_bare")),
    ("GFLOP/s", 1, ("gflops", "gflops_bare")),
    ("share of the peak [4]", 3, ("share_of_peak", "share_of_peak_bare")),
    ("peak memory, MiB [5]", 0, ("peak_memory_mib",)),
)
# Figures below the columns.
MORE = (
    "pairs",
    "ratio_to_bare",
    "ratio_to_bare_quartiles",
    "ratio_to_pil",
    "ratio_to_pil_quartiles",
    "extra_ms_per_step",
    "extra_ms_per_step_quartiles",
    "data_ms",
    "network_ms",
    "optimizer_ms",
    "gflop_per_step",
    "threads",
    "seconds_to_first_step",
)
CPU_NOTES = (
    "[1] time in operators, under the profiler",
    "[2] until the first operator, under the profiler; a CPU launches no kernels",
    "[3] operators that read values (item, nonzero); a CPU has nothing to wait for",
    "[5] resident memory of the process, before the other loops start",
)
GPU_NOTES = (
    "[1] time in kernels, divided by the step without the profiler",
    "[2] under the profiler, which slows the host down",
    "[3] calls that wait for the GPU",
    "[5] allocated on the GPU, before the other loops start",
)


def print_results(results: dict[str, Any], speeds: dict[str, Any], stages: list[dict[str, float]]) -> None:
    """Print the figures of a training step in columns, then the remaining figures and notes.

    Args:
        results: figures by name, see `bench_training`.
        speeds: figures of the inference by name, with its device.
        stages: rows of `bench_stages`; empty for a training whose images do not grow.
    """
    console = Console(width=WIDTH)
    setting = f"{results['precision']}{', compiled' if results['compiled'] else ''}, batch size {results['batch_size']}"
    table = Table("", title=f"{results['recipe']} on {results['hardware']}, {setting}", title_justify="left")
    for name in ("Trainer", "bare loop", "PIL loop"):
        table.add_column(name, justify="right")
    for row, decimals, names in ROWS:
        values = [format_value(results[name], decimals) for name in names]
        table.add_row(row, *values, *["-"] * (3 - len(values)))
    console.print(table)
    notes = CPU_NOTES if results["device"] == "cpu" else GPU_NOTES
    peak = f"[4] of {results['peak_gflops']:,.0f} GFLOP/s, the fastest product of two large matrices"
    for note in sorted([*notes, peak]):
        console.print(note, markup=False, highlight=False)
    console.print("-   not measured, or not defined on this device", highlight=False)
    more = Table("figure", "value")
    for name, value in {**{name: results[name] for name in MORE}, **speeds}.items():
        more.add_row(name, format_value(value, 3))
    console.print(more)
    console.print(
        "The Trainer's hooks and counters take {extra_ms_per_step:.2f} ms a step. The network and its optimizer take {0:.1f} "
        "of {step_ms:.1f} ms; without the time for data and the Trainer, the rate would be {ratio_to_pil_without_overhead:.1f} "
        "times that of the PIL loop.".format(results["network_ms"] + results["optimizer_ms"], **results),
        highlight=False,
    )
    if stages:
        print_stages(stages, console)


def format_value(value: Any, decimals: int) -> str:
    """Return a figure as text: "-" for None, and both ends of an interval."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ... ".join(format_value(item, decimals) for item in value)
    return f"{value:,.{decimals}f}" if isinstance(value, float) else str(value)
