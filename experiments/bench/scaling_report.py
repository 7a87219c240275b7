"""Render the scaling page from the record that `darkroom scaling` writes."""

import math
import statistics
from typing import Any

from experiments.bench.timing import quartiles
from modules.training.averaging import BUCKETS, MAX_BUCKET, MIN_BUCKET, bucket_bytes

# Assumed hardware: machines of eight A100s (NVIDIA's data sheets of A100, NVLink 3 and HDR InfiniBand).
PEAK = 156e12  # FLOP/s in TF32
SUSTAINED = 0.4  # fraction of the peak reached by convolutions and matrix products that fill the GPU
OPERATOR = 5e-6  # seconds to launch an operator: a lower bound of the step time for small networks
NODE = 8  # GPUs per machine
NVLINK, INFINIBAND = 300e9, 25e9  # bytes per second sent by a GPU, within a machine and between machines
BANDWIDTH_FRACTION = 0.8  # fraction of the bandwidth that NCCL reaches with large messages
HOP = {NVLINK: 5e-6, INFINIBAND: 10e-6}  # latency of a message in seconds
BACKWARD = 2 / 3  # share of the backward pass in the computing of a step


def render(record: dict[str, Any]) -> str:
    """Render the page as Markdown."""
    runs = record["runs"]
    largest = max(runs, key=lambda run: sum(gradient_bytes(run)))
    return "\n".join(
        [
            "# Scaling",
            "",
            f"Rendered by `{record['command']} --write` from `experiments/bench/scaling.json`.",
            "",
            "Every process has the recipe's batch size (weak scaling): the work per process is constant, and only "
            "communication is added.",
            "",
            *render_measurements(record),
            *render_link(record),
            "",
            *render_communication(runs),
            "",
            *render_estimates(runs),
            "",
            *render_calculation(largest),
            "",
        ]
    )


def render_measurements(record: dict[str, Any]) -> list[str]:
    """Render the measured time per image and efficiency."""
    count, hardware = record["processes"], record["runs"][0]["hardware"]
    rounds = len(record["runs"][0]["seconds"]["single"])
    lines = [
        f"## From one process to {count}, measured",
        "",
        f"{hardware['accelerator']}, {hardware['cores']} cores as reported by the system, {hardware['threads']} thread(s) per "
        f"process, {hardware['precision']}. Medians of {rounds} interleaved intervals. *Independent* means {count} processes "
        "without communication, each with a separate batch; it isolates the cost of the shared machine. Efficiency is the "
        "step time of a single process divided by that of DDP or of independent processes, with quartiles in parentheses.",
        "",
        f"| recipe | batch per process | ms per image, 1 | {count}, DDP | {count}, independent | efficiency, DDP "
        "| efficiency, independent |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for run in record["runs"]:
        spent = run["seconds"]
        times = {kind: 1000 * statistics.median(spent[kind]) / run["batch"] for kind in spent}
        cells = [
            format_number(times["single"]),
            format_number(times["ddp"] / count),
            format_number(times["independent"] / count),
        ]
        for kind in ("ddp", "independent"):
            ratios = [single / several for single, several in zip(spent["single"], spent[kind], strict=True)]
            lower, upper = quartiles(ratios)
            cells.append(f"{statistics.median(ratios):.0%} ({lower:.0%} to {upper:.0%})")
        lines.append(f"| {run['recipe']} | {run['batch']} | {' | '.join(cells)} |")
    return lines


def render_link(record: dict[str, Any]) -> list[str]:
    """Render the measurements over the link of limited bandwidth; empty without one."""
    if "link" not in record:
        return []
    link = record["link"]
    lines = [
        "",
        f"### Two processes over a link of {link['bandwidth']}",
        "",
        "The processes run in two network namespaces of this machine, joined by virtual interfaces with a token bucket filter. "
        f"Measured over it: an all-reduce of 4 bytes takes {format_number(1e6 * link['latency'])} µs, and one of 8 MiB has "
        f"{format_number(link['bytes_per_second'] / 1e6)} MB/s.",
        "",
        "| recipe | gradients per step, MB | ms per step, 1 | 2, shared memory | 2, link | gradients at the link's rate, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for run in record["runs"]:
        times = [format_number(1000 * statistics.median(run["seconds"][kind])) for kind in ("single", "ddp", "link")]
        total = sum(gradient_bytes(run))
        sent = format_number(1000 * total / link["bytes_per_second"])
        lines.append(f"| {run['recipe']} | {format_number(total / 1e6)} | {' | '.join(times)} | {sent} |")
    return lines


def render_communication(runs: list[dict[str, Any]]) -> list[str]:
    """Render the bytes sent per step."""
    lines = [
        "## Communication per step",
        "",
        "Ranks average the gradients of a network once per update of that network, in float32, in buckets "
        f"that are full at 1/{BUCKETS} of them, {MIN_BUCKET // 2**20} to {MAX_BUCKET // 2**20} MiB, while the backward pass "
        "continues. They also exchange one byte for signals, and the losses when these are logged. "
        "In a ring of n processes each one sends 2(n - 1)/n times the gradients.",
        "",
        "| recipe | updates per step | gradients per step, MB | sent by each of 2, MB | of 8, MB | of 64, MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for run in runs:
        updates = ", ".join(f"{phase['name'] or 'all'} {format_number(phase['moves'])}" for phase in run["phases"])
        total = sum(gradient_bytes(run)) / 1e6
        sent = " | ".join(format_number(2 * (n - 1) / n * total) for n in (2, 8, 64))
        lines.append(f"| {run['recipe']} | {updates} | {format_number(total)} | {sent} |")
    return lines


def render_estimates(runs: list[dict[str, Any]]) -> list[str]:
    """Render the estimates for 8 and 64 GPUs, from the operations and bytes of a step."""
    lines = [
        "## On 8 and 64 GPUs, estimated",
        "",
        f"Calculated, not measured. Assumptions: A100s, {NODE} per machine, {SUSTAINED:.0%} of {PEAK / 1e12:.0f} TFLOP/s in "
        f"TF32; {OPERATOR * 1e6:.0f} µs to launch an operator, which bounds the step time of small networks; NVLink with "
        f"{NVLINK / 1e9:.0f} GB/s and InfiniBand with {INFINIBAND / 1e9:.0f} GB/s per GPU, {BANDWIDTH_FRACTION:.0%} of either "
        f"reached; {HOP[NVLINK] * 1e6:.0f} and {HOP[INFINIBAND] * 1e6:.0f} µs per hop; all-reduces by "
        "double binary trees (NCCL 2.4 and later), in 2 log2(n) hops, which overlap the backward pass, "
        f"{BACKWARD:.0%} of the computing of a step, except for the last bucket of each update.",
        "",
        "| recipe | images per GPU | GFLOP | operators | step, ms | averaging on 8, ms | exposed, ms | efficiency | on 64, ms "
        "| exposed, ms | efficiency |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        step = step_seconds(run)
        cells = " | ".join(
            f"{format_number(1000 * allreduce_seconds(run, n))} | {format_number(1000 * exposed_seconds(run, n))} "
            f"| {step / (step + exposed_seconds(run, n)):.0%}"
            for n in (NODE, 64)
        )
        cost = f"{format_number(run['flops'] / 1e9)} | {run['operators']:,.0f} | {format_number(1000 * step)}"
        lines.append(f"| {run['recipe']} | {run['batch']} | {cost} | {cells} |")
    return lines


def render_calculation(run: dict[str, Any]) -> list[str]:
    """Render the calculation behind one row of the estimates."""
    flops, operators, step = run["flops"] / SUSTAINED / PEAK, run["operators"] * OPERATOR, step_seconds(run)
    lines = [
        f"## The calculation for {run['recipe']}",
        "",
        "```",
        f"computing   {run['flops']:.3g} FLOP / ({SUSTAINED} x {PEAK:.3g} FLOP/s) = {format_number(1000 * flops)} ms",
        f"launching   {run['operators']:.0f} operators x {OPERATOR * 1e6:.0f} µs = {format_number(1000 * operators)} ms",
        f"step        the larger of these, {format_number(1000 * step)} ms",
    ]
    for n in (NODE, 64):
        rate, exposed = link_bandwidth(n), exposed_seconds(run, n)
        megabytes = sum(gradient_bytes(run)) / 1e6
        transfer = 2 * (n - 1) / n * megabytes * 1e6 / BANDWIDTH_FRACTION / rate
        latency = messages(run) * hops(n) * HOP[rate]
        sum_ms = f"{format_number(1000 * step)} + {format_number(1000 * exposed)}"
        lines += [
            "",
            f"{n} GPUs",
            f"bytes       {2 * (n - 1)}/{n} x {megabytes:.4g} MB / ({BANDWIDTH_FRACTION} x {rate / 1e9:.0f} GB/s) "
            f"= {format_number(1000 * transfer)} ms",
            f"hops        {messages(run):.3g} buckets x {hops(n)} x {HOP[rate] * 1e6:.0f} µs "
            f"= {format_number(1000 * latency)} ms",
            f"exposed     the last buckets, and what exceeds {BACKWARD:.0%} of the step = {format_number(1000 * exposed)} ms",
            f"efficiency  {format_number(1000 * step)} / ({sum_ms}) = {step / (step + exposed):.0%}",
        ]
    return [*lines, "```"]


def gradient_bytes(run: dict[str, Any]) -> list[float]:
    """Return the gradient bytes per training step, one value per phase."""
    return [phase["bytes"] * phase["moves"] for phase in run["phases"]]


def messages(run: dict[str, Any]) -> float:
    """Return the largest number of buckets per training step; all but the last bucket of a phase are full."""
    return float(sum(math.ceil(phase["bytes"] / bucket_bytes(phase["bytes"])) * phase["moves"] for phase in run["phases"]))


def step_seconds(run: dict[str, Any]) -> float:
    """Return the seconds of a step on one GPU: the larger of computing and launching."""
    return max(run["flops"] / (SUSTAINED * PEAK), run["operators"] * OPERATOR)


def link_bandwidth(n: int) -> float:
    """Return the bandwidth of the slowest link in a ring of n GPUs, in bytes per second."""
    return NVLINK if n <= NODE else INFINIBAND


def allreduce_seconds(run: dict[str, Any], n: int) -> float:
    """Return the seconds per step of the all-reduces of the gradients over n GPUs."""
    return tree_seconds(sum(gradient_bytes(run)), messages(run), n)


def tree_seconds(total_bytes: float, count: float, n: int) -> float:
    """Return the seconds of `count` all-reduces of `total_bytes` together over n GPUs.

    NCCL's double binary trees send as many bytes as a ring, 2(n - 1)/n times the tensor, in 2 log2(n) hops.
    """
    rate = link_bandwidth(n)
    return 2 * (n - 1) / n * total_bytes / (BANDWIDTH_FRACTION * rate) + count * hops(n) * HOP[rate]


def hops(n: int) -> int:
    """Return the number of consecutive messages of an all-reduce over n GPUs."""
    return 2 * math.ceil(math.log2(n))


def exposed_seconds(run: dict[str, Any], n: int) -> float:
    """Return the seconds per step that the all-reduces take in addition to the computing.

    The last bucket of an update is complete when the backward pass ends. The others overlap it, as far as its time suffices.
    """
    last = sum(
        tree_seconds(min(phase["bytes"], bucket_bytes(phase["bytes"])) * phase["moves"], phase["moves"], n)
        for phase in run["phases"]
    )
    return last + max(0.0, allreduce_seconds(run, n) - last - BACKWARD * step_seconds(run))


def format_number(value: float) -> str:
    """Format a number with three significant digits, or as an integer if it is at least 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
