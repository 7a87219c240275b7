"""The page that compares a style network with optimization, rendered from its records."""

import json
from typing import Any

from experiments import METHODS

FOLDER = METHODS / "style/comparison"
COUNTS = (100, 300, 500)  # iterations
# Table 1: the duration of these iterations divided by that of the network, on a GTX Titan X; from memory, but consistent with
# the times in the table.
PAPER = {"256": (212, 636, 1060), "512": (205, 615, 1026), "1024": (208, 625, 1042)}


def save(name: str, record: dict[str, Any], write: bool) -> None:
    """Save a record, if `write`, and render the page from all saved records."""
    if not write:
        return
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(rounded(record), indent=1) + "\n")
    if name == "objective":
        plot_objective(record)
    (FOLDER / "README.md").write_text(render())


def render() -> str:
    """Render the page as Markdown, from the saved records."""
    lines = ["# A style network compared with optimization", ""]
    for name, render_part in (("speed", render_speed), ("objective", render_objective)):
        path = FOLDER / f"{name}.json"
        if path.exists():
            lines += [render_part(json.loads(path.read_text())), ""]
    return "\n".join(lines)


def render_speed(record: dict[str, Any]) -> str:
    """Render Table 1 of the paper with our ratios."""
    lines = [
        "## Speed: Table 1",
        "",
        f"Rendered by `{record['command']} --write` at {record['commit']} on {record['hardware']}, {record['threads']} "
        f"threads. Loss network: {record['feature_network']}. Style network, with random weights: {record['base_channels']} "
        f"channels at full resolution, "
        f"{record['norm']} normalization, {record['upsampling']} upsampling. The duration of iterations of L-BFGS is divided "
        "by that of a forward pass of the style network, all measured in one run. Cells marked (extrapolated) are the mean "
        "duration of the timed iterations, multiplied by their number. The objective is computed in single precision, the "
        "update of L-BFGS by SciPy on the CPU in double precision. The paper's values, on a GTX "
        "Titan X, are from memory, confirmed by an arithmetic check.",
        "",
        "| image | network, s | iteration, s | 100 iterations | paper | 300 iterations | paper | 500 iterations | paper |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size, times in record["sizes"].items():
        cells = [f"{size} x {size}", f"{times['network']:.3g}", f"{mean(times['iterations']):.3g}"]
        for count, paper in zip(COUNTS, PAPER[size], strict=True):
            cells += [format_ratio(times, count), f"{paper}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_ratio(times: dict[str, Any], count: int) -> str:
    """Format the duration of `count` iterations divided by that of a forward pass."""
    measured = times["iterations"]
    if len(measured) >= count:
        return f"{sum(measured[:count]) / times['network']:.0f}x"
    return f"{count * mean(measured) / times['network']:.0f}x (extrapolated)"


def render_objective(record: dict[str, Any]) -> str:
    """Render the comparison of Figure 5."""
    lines = [
        "## Objective: Figure 5",
        "",
        f"Rendered by `{record['command']} --write` at {record['commit']}, at {record['size']} x {record['size']} pixels. The "
        "optimization starts from the photograph. In the paper, the objective of the network is that of 50 to 100 iterations "
        "(Section 4.1, from memory), for a network with a longer training and the losses of VGG-16.",
        "",
        "| photograph | photograph itself | 50 iterations | 100 | 300 | last (at most 500) | network | equals iteration |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, curve in record["photographs"].items():
        values = curve["iterations"]
        at = [f"{values[min(count, len(values)) - 1]:.4g}" for count in (50, 100, 300)]
        cells = [name, f"{curve['content']:.4g}", *at, f"{values[-1]:.4g}", f"{curve['network']:.4g}", equal_step(curve)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![Objective by iterations](objective.png)"])


def equal_step(curve: dict[str, Any]) -> str:
    """Return the first iteration whose objective is at most that of the network, or "more than" the last one."""
    values = curve["iterations"]
    steps = (str(step) for step, value in enumerate(values, 1) if value <= curve["network"])
    return next(steps, f"more than {len(values)}")


def plot_objective(record: dict[str, Any]) -> None:
    """Plot the objectives by iteration, one color for each photograph; the dashed lines are those of the network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for i, (name, curve) in enumerate(record["photographs"].items()):
        values = [curve["content"], *curve["iterations"]]
        axes.plot(range(len(values)), values, color=f"C{i}", label=f"{name}: L-BFGS")
        axes.axhline(curve["network"], color=f"C{i}", linestyle="--", label=f"{name}: network")
    axes.set(xlabel="iterations of L-BFGS", ylabel="objective", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(FOLDER / "objective.png", dpi=120)
    pyplot.close(figure)


def mean(values: list[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def rounded(value: Any) -> Any:
    """Round all floats to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
