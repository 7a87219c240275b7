"""Report of a search: table, plots and the best recipe."""

import csv
import html
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import optuna
import optuna.visualization as plotly
import optuna.visualization.matplotlib as mpl
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from experiments.run.paths import runs_root
from experiments.run.run_dir import Run
from experiments.search.spec import Search

N_PRINTED = 10  # trials in the printed table
PLOTS = {  # titles by name in Optuna; plots require at least two complete trials
    "optimization_history": "History",
    "param_importances": "Importance",
    "parallel_coordinate": "Parallel coordinates",
}
FIGSIZE = (11.0, 4.5)  # inches


def report(search: Search, study: optuna.Study, folder: Path) -> None:
    """Write the results so far to the folder and print the best trials.

    The files are trials.csv with all trials that have ended, and best.yaml. If at least two trials are complete, there are also
    a PNG of each plot, report.html, and README.md with table and plots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    ranked = sorted(complete, key=lambda trial: trial.value or 0.0, reverse=search.maximize)
    counts = {state: sum(trial.state == state and not superseded(trial) for trial in trials) for state in TrialState}
    failed = [trial for trial in trials if trial.state == TrialState.FAIL and not superseded(trial)]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    write_trials(search, [*ranked, *pruned, *failed], folder / "trials.csv")
    summary = ", ".join(
        f"{counts[state]} {name}"
        for state, name in (
            (TrialState.COMPLETE, "complete"),
            (TrialState.PRUNED, "ended early"),
            (TrialState.FAIL, "failed"),
            (TrialState.RUNNING, "running"),
            (TrialState.WAITING, "waiting"),
        )
        if counts[state]
    )
    if not complete:
        print(f"{search.name}: {summary or 'no trials yet'}")
        return
    print_best(search, [*ranked[:N_PRINTED], *failed[-N_PRINTED:]], summary)
    (folder / "best.yaml").write_text(best_recipe(search, ranked[0]))
    if len(complete) > 1:
        for plot in plots_of(ranked):
            save_plot(search, study, plot, folder / f"{plot}.png")
        (folder / "report.html").write_text(render_html(search, study, ranked, failed, summary))
        (folder / "README.md").write_text(render_markdown(search, ranked, failed, summary))
        print(f"report    {folder / 'report.html'}")
    print(f"best      {folder / 'best.yaml'}  (train it with darkroom fit)")


def superseded(trial: FrozenTrial) -> bool:
    """Return whether a trial failed without an error, because it was requeued or over budget."""
    return trial.state == TrialState.FAIL and "reason" not in trial.user_attrs


def print_best(search: Search, trials: list[FrozenTrial], summary: str) -> None:
    """Print the best trials, and those that failed, as a table."""
    table = Table(title=f"{search.name}: {search.metric}; {summary}", title_justify="left")
    for name in ("trial", search.metric, *search.search_space):
        table.add_column(name, justify="right")
    for trial in trials:
        table.add_row(*cells(search, trial))
    Console(width=max(100, 24 * (2 + len(search.search_space)))).print(table)


def cells(search: Search, trial: FrozenTrial) -> list[str]:
    """Return a trial's table row: number, metric value and parameters."""
    params = [trial.params[key] for key in search.search_space]
    value = "failed" if trial.value is None else f"{trial.value:.6g}"
    return [str(trial.number), value, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in params)]


def write_trials(search: Search, trials: list[FrozenTrial], path: Path) -> None:
    """Write trials to a CSV file, one row each, in the given order."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", search.metric, *search.search_space, "seconds", "run", "reason"])
        for trial in trials:
            seconds = round(trial.duration.total_seconds()) if trial.duration else ""
            params = [trial.params[key] for key in search.search_space]
            words = [trial.user_attrs["run"], trial.user_attrs.get("reason", "")]
            writer.writerow([trial.number, trial.state.name, trial.value, *params, seconds, *words])


def plots_of(trials: list[FrozenTrial]) -> dict[str, str]:
    """Return the plots with their titles; the importance of parameters is undefined if all values are equal."""
    differ = len({trial.value for trial in trials}) > 1
    return {plot: title for plot, title in PLOTS.items() if differ or plot != "param_importances"}


def make_plot(library: ModuleType, search: Search, study: optuna.Study, plot: str) -> Any:
    """Make a plot with one of Optuna's two plotting libraries.

    The importance of a parameter is its fraction of the metric's variance (fANOVA). Optuna's default compares the best tenth of
    the trials with the others, but the most important parameter may hardly vary in that tenth.
    """
    options = {"evaluator": FanovaImportanceEvaluator(seed=0)} if plot == "param_importances" else {}
    return getattr(library, f"plot_{plot}")(study, target_name=search.metric, **options)


def save_plot(search: Search, study: optuna.Study, plot: str, path: Path) -> None:
    """Save one of Optuna's plots as a PNG."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna's matplotlib plots are experimental
        with plt.rc_context({"figure.figsize": FIGSIZE}):
            axes = make_plot(mpl, search, study, plot)
    figure = (axes if hasattr(axes, "figure") else axes[0]).figure
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)


def render_markdown(search: Search, trials: list[FrozenTrial], failed: list[FrozenTrial], summary: str) -> str:
    """Render the table of complete and failed trials and the plots as Markdown with links to the files in the same folder."""
    names = ["trial", search.metric, *search.search_space]
    table = [names, ["---:"] * len(names), *(cells(search, trial) for trial in [*trials, *failed])]
    return "\n".join(
        [
            f"# {html.escape(search.name)}",
            "",
            f"{summary}; trials of `darkroom fit {search.recipe_name}`. All trials: [trials.csv](trials.csv). "
            "Best trial as a recipe: [best.yaml](best.yaml).",
            "",
            *(f"| {' | '.join(html.escape(cell).replace('|', '&#124;') for cell in row)} |" for row in table),
            "",
            *(f"![{title}]({plot}.png)\n" for plot, title in plots_of(trials).items()),
        ]
    )


def render_html(search: Search, study: optuna.Study, trials: list[FrozenTrial], failed: list[FrozenTrial], summary: str) -> str:
    """Render the table of complete and failed trials and the plots as one self-contained HTML page."""
    names = ["trial", search.metric, *search.search_space]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(search, trial)) + "</tr>"
        for trial in [*trials, *failed]
    )
    plots = []
    for i, (plot, title) in enumerate(plots_of(trials).items()):
        figure = make_plot(plotly, search, study, plot)
        plots.append(f"<h2>{title}</h2>\n{figure.to_html(full_html=False, include_plotlyjs=i == 0)}")
    title = html.escape(f"{search.name}: {search.metric}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px sans-serif; margin: 2em auto; max-width: 70em }}
td, th {{ padding: .2em .8em; text-align: right }}
</style>
</head><body><h1>{title}</h1>
<p>{html.escape(summary)}; trials of <code>darkroom fit {html.escape(search.recipe_name)}</code></p>
<table><tr>{head}</tr>
{body}
</table>
{"".join(plots)}
</body></html>
"""


def best_recipe(search: Search, best: FrozenTrial) -> str:
    """Return the recipe with the best trial's parameters, as YAML."""
    content = search.recipe.content
    argv = search.to_argv(best.params)
    for key, value in zip(argv[::2], argv[1::2], strict=True):
        if key != "--data.test":  # a search does not evaluate test sets, but the best recipe does
            set_key(content, key.removeprefix("--"), yaml.safe_load(value))
    run = Run(runs_root() / search.recipe.name / best.user_attrs["run"])
    header = [
        f"{search.recipe.name} with the best parameters of the search {search.name} (trial {best.number}).",
        f"Expected: {search.metric} {best.value:.6g}, best validation of {run.folder.name}",
        "Time: not measured",
        "Command: darkroom fit best.yaml",
    ]
    return "".join(f"# {line}\n" for line in header) + yaml.safe_dump(content, sort_keys=False)


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a command-line key in a recipe: `model.x` sets `model.init_args.x`; in a list, the last entry is changed."""
    section, _, rest = key.partition(".")
    if section in ("model", "data") and not rest.startswith(("init_args", "class_path")):
        key = f"{section}.init_args.{rest}"
    *parents, last = key.split(".")
    for name in parents:
        child = content.setdefault(name, {})
        content = child[-1] if isinstance(child, list) else child
    content[last] = value
