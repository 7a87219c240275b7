"""The network that a command uses: that of a recipe, or of a run."""

from pathlib import Path

from callbacks.run.record_file import BrokenRecord, read_record
from datamodules.errors import UserError
from experiments.run.recipes import Recipe, find_recipe
from experiments.run.run_dir import Run, runs_root

LATEST = "latest"


def find_network(name: str, run_name: str | None, overrides: list[str]) -> tuple[Recipe, list[str]]:
    """Find the recipe of a network and the words that select its weights.

    Args:
        name: a recipe, or the folder of a run.
        run_name: run of the recipe, or "latest"; None to let `resolve_weights` select the weights.
        overrides: words of the command line after the recipe.

    Returns:
        The recipe, which is the configuration of the run if there is one, and the overrides with the best weights of the run.

    Raises:
        UserError: there is no such recipe or run, or the run has no weights.
    """
    if Path(name).is_dir():
        if run_name:
            raise UserError(f"--run {run_name}: {name} is the folder of a run. Remove --run, or give the recipe")
        run = Run(Path(name))
        recipe_name = _recipe_name(run)
    else:
        recipe = find_recipe(name)
        if run_name is None:
            return recipe, overrides
        run, recipe_name = find_run(recipe, run_name), recipe.name
    run.read_config()
    if any(word.partition("=")[0] == "--ckpt" for word in overrides):
        return Recipe(recipe_name, run.config), overrides
    if not run.best_checkpoint.exists():
        raise UserError(f"{run.folder}: no {run.best_checkpoint.name} before the first validation. Choose another run")
    return Recipe(recipe_name, run.config), [*overrides, "--ckpt", str(run.best_checkpoint)]


def find_run(recipe: Recipe, name: str) -> Run:
    """Return the run of a recipe with that name; for "latest", the run whose best weights are the newest.

    Raises:
        UserError: there is none; the message lists those that exist.
    """
    runs = {path.parent.name: Run(path.parent) for path in sorted((runs_root() / recipe.name).glob("*/config.yaml"))}
    if name in runs:
        return runs[name]
    with_weights = [run for run in runs.values() if run.best_checkpoint.exists()]
    if name == LATEST and with_weights:
        return max(with_weights, key=lambda run: run.best_checkpoint.stat().st_mtime)
    known = f"has {', '.join(runs)}" if runs else "has no run"
    raise UserError(f"--run {name}: {runs_root() / recipe.name} {known}")


def _recipe_name(run: Run) -> str:
    """Return the name of the recipe in the record of a run; without a record, the name of the folder of its recipe."""
    try:
        return str(read_record(run.record)["recipe"])
    except (BrokenRecord, KeyError):
        return run.folder.resolve().parent.name
