"""`darkroom folds`: cross-validation, one training for each share of the images, and the mean of the test results."""

import statistics

from rich.console import Console
from rich.table import Table

from callbacks.run.record_file import read_record
from datamodules.errors import UserError
from experiments.results.reproduce import run_command
from experiments.run.config_checks import typed_keys
from experiments.run.lightning_cli import ParseOnlyCLI, validate_overrides
from experiments.run.paths import runs_root
from experiments.run.recipes import Recipe
from experiments.run.run_dir import Run


def folds(recipe: Recipe, count: int, overrides: list[str]) -> None:
    """Train a recipe once for each fold, and print the test results of each fold, their mean and standard deviation.

    The runs are named fold-1-of-N and so on. Those that are finished are not repeated; an interrupted one is resumed.

    Raises:
        UserError: an option is invalid, a training failed, or the recipe has no test results.
        SystemExit: the command was interrupted.
    """
    if refused := sorted({"run", "data.fold"} & typed_keys(overrides)):
        raise UserError(f"folds: --{refused[0]} is set by the command. Remove it")
    validate_overrides(recipe, [*overrides, "--data.fold", f"1/{count}"])
    runs = [Run(runs_root() / recipe.name / f"fold-{k}-of-{count}") for k in range(1, count + 1)]
    for k, run in enumerate(runs, 1):
        if run.record.exists():
            check_settings(recipe, run, [*overrides, "--data.fold", f"{k}/{count}"])
        if not (run.record.exists() and run.evaluated):
            run_command("fit", recipe.argument, *overrides, "--data.fold", f"{k}/{count}", "--run", run.folder.name)
    records = [read_record(run.record) for run in runs]
    results = [record.get("metrics", {}) for record in records]
    table = Table("dataset", "protocol", *(f"fold {k}" for k in range(1, count + 1)), "mean", "std")
    for dataset in results[0]:
        for protocol in results[0][dataset]:
            values = [float(result[dataset][protocol]["mean"]) for result in results]
            spread = statistics.stdev(values)
            table.add_row(dataset, protocol, *(f"{value:.4f}" for value in (*values, statistics.fmean(values), spread)))
    if not table.row_count:
        raise UserError(f"folds: {recipe.name} has no test results. Add held-out to data.test")
    Console().print(table)


def check_settings(recipe: Recipe, run: Run, words: list[str]) -> None:
    """Check that a finished fold was trained with the settings of the command.

    Raises:
        UserError: a setting differs.
    """
    cli = ParseOnlyCLI("fit", recipe, words)
    changed = [*cli.config_diff(run, "model", set()), *cli.config_diff(run, "data", {"num_workers"})]
    if (seed := read_record(run.record).get("seed")) != cli.config.seed_everything:
        changed.append(("seed_everything", seed, cli.config.seed_everything))
    if changed:
        key, theirs, ours = changed[0]
        raise UserError(f"folds: {run.folder} was trained with {key} {theirs}, not {ours}. Remove it, or set DARKROOM_RUNS")
