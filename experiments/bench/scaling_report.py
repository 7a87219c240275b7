"""The scaling page, rendered from the record that `darkroom scaling` has written; nothing on it is typed."""

import math
import statistics
from typing import Any

from experiments.bench.reference_loop import quartiles

# What an A100 of a machine of eight is assumed to do (NVIDIA's data sheets of A100, NVLink 3 and HDR InfiniBand).
PEAK = 156e12  # operations of arithmetic a second, TF32
SUSTAINED = 0.4  # of that, in convolutions and products of matrices that fill the GPU
OPERATOR = 5e-6  # seconds from one operator to the next: no step is faster than the host that launches it
NODE = 8  # GPUs of a machine
NVLINK, INFINIBAND = 300e9, 25e9  # bytes a second that a GPU sends, within a machine and to another
REACHED = 0.8  # of these, by NCCL with large messages
HOP = {NVLINK: 5e-6, INFINIBAND: 10e-6}  # seconds until a message arrives, however short
BUCKET = 25 * 2**20  # bytes that travel together, as in modules/training/gradients.py


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    runs = record["runs"]
    largest = max(runs, key=lambda run: sum(gradients(run)))
    return "\n".join(
        [
            "# Scaling",
            "",
            f"Rendered by `{record['command']} --write` from `experiments/bench/scaling.json`; nothing here is typed.",
            "",
            "Every process takes the recipe's batch, so that all have the same work and only what travels is added.",
            "",
            *on_this_machine(record),
            "",
            *what_travels(runs),
            "",
            *on_many_gpus(runs),
            "",
            *arithmetic(largest),
            "",
        ]
    )


def on_this_machine(record: dict[str, Any]) -> list[str]:
    """Measured: time per image and efficiency."""
    count, hardware = record["processes"], record["runs"][0]["hardware"]
    rounds = len(record["runs"][0]["seconds"]["alone"])
    lines = [
        f"## From one process to {count}, measured",
        "",
        f"{hardware['accelerator']}, {hardware['cores']} cores as the system counts them, with {hardware['threads']} of "
        f"its threads a process, {hardware['precision']}. Medians of {rounds} interleaved stretches. *Apart* are {count} "
        "processes that know nothing of each other, on a batch each: what the machine itself loses when they share it. "
        "Efficiency is the time of a step alone beside that of one together, or apart; its quartiles in brackets.",
        "",
        f"| recipe | batch of a process | ms per image, 1 | {count} together | {count} apart | efficiency together | apart |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for run in record["runs"]:
        spent = run["seconds"]
        times = {kind: 1000 * statistics.median(spent[kind]) / run["batch"] for kind in spent}
        cells = [figure(times["alone"]), figure(times["together"] / count), figure(times["apart"] / count)]
        for kind in ("together", "apart"):
            ratios = [one / several for one, several in zip(spent["alone"], spent[kind], strict=True)]
            lower, upper = quartiles(ratios)
            cells.append(f"{statistics.median(ratios):.0%} ({lower:.0%} to {upper:.0%})")
        lines.append(f"| {run['recipe']} | {run['batch']} | {' | '.join(cells)} |")
    return lines


def what_travels(runs: list[dict[str, Any]]) -> list[str]:
    """Bytes a step."""
    lines = [
        "## What travels in a step",
        "",
        "The mean of each gradient, once for each move of the network that it moves, in single precision, in buckets of "
        f"{BUCKET // 2**20} MiB; beside it a byte that asks whether a signal has come, and the losses when they are logged. "
        "On a ring of n processes each sends 2(n - 1)/n times the gradients.",
        "",
        "| recipe | moves a step | gradients a step, MB | sent by each of 2, MB | of 8, MB | of 64, MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for run in runs:
        moves = ", ".join(f"{phase['name'] or 'all'} {figure(phase['moves'])}" for phase in run["phases"])
        total = sum(gradients(run)) / 1e6
        sent = " | ".join(figure(2 * (n - 1) / n * total) for n in (2, 8, 64))
        lines.append(f"| {run['recipe']} | {moves} | {figure(total)} | {sent} |")
    return lines


def on_many_gpus(runs: list[dict[str, Any]]) -> list[str]:
    """Expected, from the work and the bytes of a step."""
    lines = [
        "## On 8 and 64 GPUs, expected",
        "",
        f"Computed, not measured. Assumed: A100s, {NODE} to a machine, {PEAK / 1e12:.0f} TFLOP/s in TF32 of which "
        f"{SUSTAINED:.0%} are reached; {OPERATOR * 1e6:.0f} µs from one operator to the next, so that a small network's step "
        f"takes as long as launching it; NVLink with {NVLINK / 1e9:.0f} GB/s and InfiniBand with {INFINIBAND / 1e9:.0f} GB/s a "
        f"GPU, {REACHED:.0%} of either reached; {HOP[NVLINK] * 1e6:.0f} and {HOP[INFINIBAND] * 1e6:.0f} µs a hop; rings; "
        "gradients averaged when the backward pass has ended, and nothing beside it.",
        "",
        "| recipe | images a GPU | GFLOP | operators | step, ms | averaging on 8, ms | efficiency | on 64, ms | efficiency |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        step = computing(run)
        cells = " | ".join(f"{figure(1000 * averaging(run, n))} | {step / (step + averaging(run, n)):.0%}" for n in (NODE, 64))
        work = f"{figure(run['flops'] / 1e9)} | {run['operators']:,.0f} | {figure(1000 * step)}"
        lines.append(f"| {run['recipe']} | {run['batch']} | {work} | {cells} |")
    return lines


def arithmetic(run: dict[str, Any]) -> list[str]:
    """One row of the table before, step by step."""
    flops, operators, step = run["flops"] / SUSTAINED / PEAK, run["operators"] * OPERATOR, computing(run)
    lines = [
        f"## The arithmetic, for {run['recipe']}",
        "",
        "```",
        f"computing   {run['flops']:.3g} FLOP / ({SUSTAINED} x {PEAK:.3g} FLOP/s) = {figure(1000 * flops)} ms",
        f"launching   {run['operators']:.0f} operators x {OPERATOR * 1e6:.0f} µs = {figure(1000 * operators)} ms",
        f"step        the larger of them, {figure(1000 * step)} ms",
    ]
    for n in (NODE, 64):
        rate, turns, all_ = link(n), 2 * (n - 1), averaging(run, n)
        travelling, waiting = turns / n * sum(gradients(run)) / REACHED / rate, messages(run) * turns * HOP[rate]
        lines += [
            "",
            f"{n} GPUs",
            f"bytes       {turns}/{n} x {sum(gradients(run)) / 1e6:.4g} MB / ({REACHED} x {rate / 1e9:.0f} GB/s) "
            f"= {figure(1000 * travelling)} ms",
            f"hops        {messages(run):.3g} buckets x {turns} x {HOP[rate] * 1e6:.0f} µs = {figure(1000 * waiting)} ms",
            f"efficiency  {figure(1000 * step)} / ({figure(1000 * step)} + {figure(1000 * all_)}) = {step / (step + all_):.0%}",
        ]
    return [*lines, "```"]


def gradients(run: dict[str, Any]) -> list[float]:
    """Bytes a training step, by phase."""
    return [phase["bytes"] * phase["moves"] for phase in run["phases"]]


def messages(run: dict[str, Any]) -> float:
    """Buckets a training step, if all are full but the last."""
    return float(sum(math.ceil(phase["bytes"] / BUCKET) * phase["moves"] for phase in run["phases"]))


def computing(run: dict[str, Any]) -> float:
    """Seconds of a step on one GPU: of its arithmetic, or of launching it."""
    return max(run["flops"] / (SUSTAINED * PEAK), run["operators"] * OPERATOR)


def link(n: int) -> float:
    """Bytes a second of the slowest link in a ring of so many GPUs."""
    return NVLINK if n <= NODE else INFINIBAND


def averaging(run: dict[str, Any], n: int) -> float:
    """Seconds a step until n GPUs have the mean of their gradients: a ring passes each n-th part 2(n - 1) times."""
    rate = link(n)
    return 2 * (n - 1) * (sum(gradients(run)) / n / (REACHED * rate) + messages(run) * HOP[rate])


def figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
