"""What came of a search: a table, pictures, and the best recipe."""

import csv
import html
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import optuna
import optuna.visualization as interactive
import optuna.visualization.matplotlib as drawn
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from experiments.run.run_dir import Run, runs_root
from experiments.search.spec import Search

SHOWN = 10  # trials in the table on the terminal
PLOTS = {  # at least two trials must have a value for them
    "optimization_history": "History",
    "param_importances": "Importance",
    "parallel_coordinate": "Parallel coordinates",
}
SIZE = (11.0, 4.5)  # inches


def report(search: Search, study: optuna.Study, folder: Path) -> None:
    """What came of a search so far, as files in the folder; the best trials are printed too.

    trials.csv, all that ended; best.yaml; and with two complete trials a PNG of each plot, report.html with all of it, and
    README.md, which shows table and plots wherever Markdown is shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    rows = sorted(done, key=lambda trial: trial.value or 0.0, reverse=search.maximise)
    counts = {state: sum(trial.state == state and not superseded(trial) for trial in trials) for state in TrialState}
    write_trials(search, [*rows, *(trial for trial in trials if trial.state == TrialState.PRUNED)], folder / "trials.csv")
    said = ", ".join(
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
    if not done:
        print(f"{search.name}: {said or 'no trials yet'}")
        return
    show(search, rows[:SHOWN], said)
    (folder / "best.yaml").write_text(best_recipe(search, rows[0]))
    if len(done) > 1:
        for plot in PLOTS:
            draw(search, study, plot, folder / f"{plot}.png")
        (folder / "report.html").write_text(page(search, study, rows, said))
        (folder / "README.md").write_text(markdown(search, rows, said))
        print(f"look at   {folder / 'report.html'}")
    print(f"best      {folder / 'best.yaml'}  (darkroom fit takes it)")


def superseded(trial: FrozenTrial) -> bool:
    """Whether a trial failed for no fault of its own: it was put back, or came too late."""
    return trial.state == TrialState.FAIL and "reason" not in trial.user_attrs


def show(search: Search, rows: list[FrozenTrial], said: str) -> None:
    """The best trials on the terminal."""
    table = Table(title=f"{search.name}: {search.metric}; {said}", title_justify="left")
    for name in ("trial", search.metric, *search.searched):
        table.add_column(name, justify="right")
    for trial in rows:
        table.add_row(*cells(search, trial))
    Console(width=max(100, 24 * (2 + len(search.searched)))).print(table)


def cells(search: Search, trial: FrozenTrial) -> list[str]:
    """A trial's line in a table: its number, its figure, and what it chose."""
    chosen = [trial.params[key] for key in search.searched]
    return [str(trial.number), f"{trial.value:.6g}", *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in chosen)]


def write_trials(search: Search, trials: list[FrozenTrial], path: Path) -> None:
    """A row a trial, the best first, those that ended early last."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", search.metric, *search.searched, "seconds", "run"])
        for trial in trials:
            seconds = round(trial.duration.total_seconds()) if trial.duration else ""
            chosen = [trial.params[key] for key in search.searched]
            writer.writerow([trial.number, trial.state.name, trial.value, *chosen, seconds, trial.user_attrs["run"]])


def plotted(library: ModuleType, search: Search, study: optuna.Study, plot: str) -> Any:
    """A plot by one of optuna's two libraries.

    Importance is the share of the figures' variance (fANOVA): optuna's own choice asks what sets the best tenth of the trials
    apart, among which what matters most may not vary any more.
    """
    chosen = {"evaluator": FanovaImportanceEvaluator(seed=0)} if plot == "param_importances" else {}
    return getattr(library, f"plot_{plot}")(study, target_name=search.metric, **chosen)


def draw(search: Search, study: optuna.Study, plot: str, path: Path) -> None:
    """One of optuna's plots as a PNG."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # optuna may come to draw them otherwise
        with plt.rc_context({"figure.figsize": SIZE}):
            axes = plotted(drawn, search, study, plot)
    figure = (axes if hasattr(axes, "figure") else axes[0]).figure
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)


def markdown(search: Search, rows: list[FrozenTrial], said: str) -> str:
    """Table and plots for a page that lies beside them."""
    names = ["trial", search.metric, *search.searched]
    table = [names, ["---:"] * len(names), *(cells(search, trial) for trial in rows)]
    return "\n".join(
        [
            f"# {html.escape(search.name)}",
            "",
            f"{said}; trials of `darkroom fit {search.recipe_name}`. All of them: [trials.csv](trials.csv); "
            "the best as a recipe: [best.yaml](best.yaml).",
            "",
            *(f"| {' | '.join(html.escape(word).replace('|', '&#124;') for word in line)} |" for line in table),
            "",
            *(f"![{title}]({plot}.png)\n" for plot, title in PLOTS.items()),
        ]
    )


def page(search: Search, study: optuna.Study, rows: list[FrozenTrial], said: str) -> str:
    """Table and plots as one HTML page that needs nothing beside it."""
    names = ["trial", search.metric, *search.searched]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(word)}</td>" for word in cells(search, trial)) + "</tr>" for trial in rows
    )
    plots = []
    for i, (plot, title) in enumerate(PLOTS.items()):
        figure = plotted(interactive, search, study, plot)
        plots.append(f"<h2>{title}</h2>\n{figure.to_html(full_html=False, include_plotlyjs=i == 0)}")
    title = html.escape(f"{search.name}: {search.metric}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px sans-serif; margin: 2em auto; max-width: 70em }}
td, th {{ padding: .2em .8em; text-align: right }}
</style>
</head><body><h1>{title}</h1><p>{html.escape(said)}; trials of <code>darkroom fit {html.escape(search.recipe_name)}</code></p>
<table><tr>{head}</tr>
{body}
</table>
{"".join(plots)}
</body></html>
"""


def best_recipe(search: Search, best: FrozenTrial) -> str:
    """The recipe with what the best trial chose, as YAML."""
    content = search.recipe.content
    words = search.words(best.params)
    for key, value in zip(words[::2], words[1::2], strict=True):
        if key != "--data.test":  # a search measures on no test set, its best recipe does
            set_key(content, key.removeprefix("--"), yaml.safe_load(value))
    run = Run(runs_root() / search.recipe.name / best.user_attrs["run"])
    header = [
        f"{search.recipe.name} with what was best in the search {search.name}, trial {best.number}.",
        f"Expected: {search.metric} {best.value:.6g}, best validation of {run.folder.name}",
        "Time: not measured",
        "Command: darkroom fit best.yaml",
    ]
    return "".join(f"# {line}\n" for line in header) + yaml.safe_dump(content, sort_keys=False)


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of the command line in a recipe: `model.x` stands below `model.init_args`, a list's in its last entry."""
    part, _, rest = key.partition(".")
    if part in ("model", "data") and not rest.startswith(("init_args", "class_path")):
        key = f"{part}.init_args.{rest}"
    *parents, last = key.split(".")
    for name in parents:
        inside = content.setdefault(name, {})
        content = inside[-1] if isinstance(inside, list) else inside
    content[last] = value
