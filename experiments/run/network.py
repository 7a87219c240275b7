"""The network that a command uses: that of a recipe, of a run, or of a file of weights."""

from pathlib import Path

from callbacks.run.record_file import BrokenRecord, read_record
from datamodules.errors import UserError
from experiments.run.paths import runs_root
from experiments.run.recipes import Recipe, add_to_path, find_recipe, recipes
from experiments.run.run_dir import Run

LATEST = "latest"


def find_network(name: str, run_name: str | None, overrides: list[str], modules: str | None = None) -> tuple[Recipe, list[str]]:
    """Find the recipe of a network and the words that select its weights.

    Args:
        name: a recipe, the folder of a run, its config.yaml, a checkpoint in such a folder, or a file of weights that describes
            its network.
        run_name: run of the recipe, or "latest"; None to let `resolve_weights` select the weights.
        overrides: words of the command line after the recipe.
        modules: Python file with the classes of a file of weights.

    Returns:
        The recipe, which is the configuration of the run if there is one, and the overrides with the best weights of the run.

    Raises:
        UserError: there is no such recipe or run, the run has no weights, or the file does not describe its network.
    """
    path = Path(name)
    if path.name == Run(path.parent).config.name and Run(path.parent).checkpoints.is_dir():
        path = path.parent
    run_folder = path.parent.parent
    is_checkpoint = path.suffix == ".ckpt" and path.is_file() and Run(run_folder).config.exists()
    is_run = path.is_dir() or is_checkpoint
    is_weights = path.suffix in (".safetensors", ".ckpt", ".pth") and not is_checkpoint
    if modules and not is_weights:
        raise UserError(f"--modules {modules}: only for a file of weights. Remove --modules, or give the file")
    if run_name and (is_run or is_weights):
        raise UserError(f"--run {run_name}: {name} is not a recipe. Remove --run, or give the recipe")
    if is_weights:
        return _network_of_file(path, overrides, modules)
    if is_run:
        run = Run(run_folder if is_checkpoint else path)
        recipe_name = _recipe_name(run)
    else:
        recipe = find_recipe(name)
        if run_name is None:
            return recipe, overrides
        run, recipe_name = find_run(recipe, run_name), recipe.name
    run.read_config()
    add_to_path(run.code)
    network = Recipe(recipe_name, run.config)
    if _has_checkpoint(overrides):
        return network, overrides
    weights = path if is_checkpoint else run.best_checkpoint
    if not weights.exists():
        raise UserError(f"{run.folder}: no {weights.name} before the first validation. Choose another run")
    return network, [*overrides, "--ckpt", str(weights)]


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
    if name == LATEST:
        raise UserError(
            f"{runs_root() / recipe.name} has no run with weights. Train the network with darkroom fit {recipe.argument}"
        )
    known = f"has {', '.join(runs)}" if runs else "has no run"
    raise UserError(f"--run {name}: {runs_root() / recipe.name} {known}")


def _has_checkpoint(words: list[str]) -> bool:
    return any(word.partition("=")[0] == "--ckpt" for word in words)


def _network_of_file(path: Path, overrides: list[str], modules: str | None) -> tuple[Recipe, list[str]]:
    """Return the recipe in a file of weights, and the overrides with these weights."""
    if not path.is_file():
        raise UserError(f"no file {path}. Check the path")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} does not describe its network. Give the recipe or the run, and --ckpt {path}")
    if _has_checkpoint(overrides):
        raise UserError(f"--ckpt: {path} contains the weights. Remove --ckpt, or give the recipe")
    from experiments.run.weights_file import load_modules, read_description, trusted_content

    if modules:
        load_modules(modules)
    description = read_description(path)
    if description is None:
        raise UserError(f"{path} does not describe its network. Give the recipe and --ckpt {path}")
    content = trusted_content(path, description)
    bundled = next((recipe for recipe in recipes() if recipe.name == description.recipe), None)
    if bundled and bundled.class_path("data") == description.data.class_path:  # the metrics of the task
        content["trainer"] = {"callbacks": bundled.content.get("trainer", {}).get("callbacks", [])}
    return Recipe(description.recipe, path, content), [*overrides, "--ckpt", str(path)]


def _recipe_name(run: Run) -> str:
    """Return the name of the recipe in the record of a run; without a record, the name of the folder of its recipe."""
    try:
        return str(read_record(run.record)["recipe"])
    except (BrokenRecord, KeyError):
        return run.folder.resolve().parent.name
