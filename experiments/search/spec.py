"""Searches: YAML files in W&B's sweep format, read for `darkroom sweep`. Nothing heavy is imported here.

The format is W&B's (docs.wandb.ai, "Define a sweep configuration"); what of it W&B's server alone can do is refused.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import UserError
from experiments.run.recipes import Recipe, find_recipe

METHODS = ("grid", "random", "bayes")
KEYS = {"name", "description", "program", "command", "method", "metric", "parameters", "early_terminate", "run_cap", "project"}
BOUNDED = ("uniform", "int_uniform", "q_uniform", "log_uniform_values")
CAP = 50  # trials of a search that has no run_cap and is no grid


@dataclass(frozen=True)
class Early:
    """Hyperband: trials that are behind at these validations end there."""

    first: int  # validation
    last: int | None
    eta: int


@dataclass(frozen=True)
class Search:
    """What is searched for, by which method, in which ranges.

    Args:
        name: of the search.
        recipe: what a trial trains.
        fixed: words of the command line that all trials have, a key and its value by turns.
        method: "grid", "random" or "bayes".
        metric: a logged figure; its best value over a run's validations counts.
        maximise: whether more of it is better.
        parameters: keys of the command line ("model.learning_rate"), each with its range as the file has it.
        early: which trials end early; None for no such.
        cap: trials at most.
    """

    name: str
    recipe: Recipe
    fixed: tuple[str, ...]
    method: str
    metric: str
    maximise: bool
    parameters: dict[str, dict[str, Any]]
    early: Early | None
    cap: int

    @property
    def recipe_name(self) -> str:
        """As `darkroom fit` takes it."""
        return self.recipe.name if self.recipe.shipped else str(self.recipe.path)

    @property
    def searched(self) -> dict[str, dict[str, Any]]:
        """The parameters that are not constant."""
        return {key: range_ for key, range_ in self.parameters.items() if "value" not in range_}

    @property
    def essence(self) -> str:
        """What must not change while a store has trials of it."""
        of = [self.recipe.name, self.fixed, self.method, self.metric, self.maximise, self.parameters]
        return json.dumps(of, sort_keys=True)

    def words(self, chosen: dict[str, Any]) -> list[str]:
        """A trial's command line behind `darkroom fit RECIPE`."""
        constant = {key: range_["value"] for key, range_ in self.parameters.items() if "value" in range_}
        written = [
            (key, value if isinstance(value, str) else json.dumps(value)) for key, value in {**constant, **chosen}.items()
        ]
        return [*self.fixed, *(word for key, value in written for word in (f"--{key}", value))]

    @property
    def example(self) -> list[str]:
        """The command line of a trial that chose the first of everything, to see whether its keys are right."""
        return self.words({key: range_.get("values", [range_.get("min")])[0] for key, range_ in self.searched.items()})

    def run_name(self, chosen: dict[str, Any]) -> str:
        """The name of a trial's run: the same for the same choice, which then goes on where it stopped."""
        return f"{self.name}-{sha256(json.dumps(self.words(chosen)).encode()).hexdigest()[:10]}"


def is_search(path: Path) -> bool:
    """Whether a file is a search, and not a recipe; `read_search` says what is wrong with it."""
    return path.suffix in (".yaml", ".yml") and path.is_file() and "\nparameters:" in path.read_text()


def read_search(path: Path, extra: list[str], cap: int | None = None) -> Search:
    """A search from its file.

    Args:
        path: the YAML.
        extra: words of the command line that all its trials have, as in ["--trainer.devices", "2"].
        cap: trials at most, instead of the file's `run_cap`.

    Raises:
        Refused: the file is not there or asks for what cannot be done; the message names the key and its value.
    """
    if not path.is_file():
        raise UserError(f"no search {path}; those that are shipped are in sweeps/")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not {"method", "metric", "parameters", "command"} <= content.keys():
        raise UserError(f"{path}: not a search, which has `method`, `metric`, `parameters` and `command`")
    if unknown := sorted(content.keys() - KEYS):
        raise UserError(f"{path}: {unknown[0]}: only W&B's own agent knows what that is (wandb sweep, wandb agent)")
    if content["method"] not in METHODS:
        raise UserError(f"{path}: method: {content['method']}; one of {', '.join(METHODS)}")
    recipe, fixed = _command(path, content["command"])
    parameters = {key: _range(path, key, value) for key, value in content["parameters"].items()}
    if both := [word for word in pairs(extra)[::2] if word.removeprefix("--") in parameters]:
        raise UserError(f"{both[0]} is searched for by {path}")
    grid = 1
    for key, range_ in parameters.items():
        if content["method"] == "grid" and not {"value", "values"} & range_.keys():
            raise UserError(f"{path}: {key}: a grid needs `values`")
        grid *= len(range_.get("values", [0]))
    name = str(content.get("name", path.stem))
    if Path(name).name != name:
        raise UserError(f"{path}: name: {name}; a name, not a path")
    cap = cap or content.get("run_cap", grid if content["method"] == "grid" else CAP)
    metric = content["metric"]
    if not isinstance(metric, dict) or "name" not in metric or metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise UserError(f"{path}: metric: {metric}; a name and a goal, minimize or maximize")
    return Search(
        name=name,
        recipe=recipe,
        fixed=(*pairs(fixed), *pairs(extra)),
        method=content["method"],
        metric=metric["name"],
        maximise=metric.get("goal") == "maximize",
        parameters=parameters,
        early=_early(path, content.get("early_terminate")),
        cap=min(cap, grid) if content["method"] == "grid" else cap,
    )


def _command(path: Path, command: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe and the fixed words of W&B's `command`, which runs `darkroom fit RECIPE ... ${args}`."""
    if "fit" not in command or command[-1] != "${args}" or command.index("fit") + 1 == len(command) - 1:
        raise UserError(f"{path}: command: {command}; it is to end in [fit, RECIPE, ..., '${{args}}']")
    recipe, *words = command[command.index("fit") + 1 : -1]
    if "--wandb" in words:  # what its agent needs, and nobody else
        at = words.index("--wandb")
        del words[at : at + 2]
    return find_recipe(recipe), words


def pairs(words: list[str]) -> list[str]:
    """Words of a command line as key and value by turns, for those that are written as one as well."""
    found = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(found) % 2 or any(not key.startswith("--") for key in found[::2]):
        raise UserError(f"{' '.join(words)}: each key of a recipe needs one value, as in --trainer.devices 2")
    return found


def _range(path: Path, key: str, range_: Any) -> dict[str, Any]:
    """What a parameter may be: {"value"}, {"values"}, or {"distribution", "min", "max"} with "q" where values have steps."""
    if not isinstance(range_, dict):
        raise UserError(f"{path}: {key}: {range_}; `value`, `values`, or `min` and `max`")
    if "value" in range_ or range_.get("values"):
        return {name: range_[name] for name in ("value", "values") if name in range_}
    low, high = range_.get("min"), range_.get("max")
    if not isinstance(low, int | float) or not isinstance(high, int | float) or low >= high:
        raise UserError(f"{path}: {key}: {range_}; `value`, `values`, or a `min` below its `max`")
    whole = isinstance(low, int) and isinstance(high, int)
    distribution = range_.get("distribution", "int_uniform" if whole else "uniform")
    if distribution not in BOUNDED:
        raise UserError(f"{path}: {key}: distribution: {distribution}; one of {', '.join(BOUNDED)}, or `values`")
    return {**range_, "distribution": distribution}


def _early(path: Path, early: dict[str, Any] | None) -> Early | None:
    if early is None:
        return None
    eta, last = int(early.get("eta", 3)), early.get("max_iter")
    if early.get("type") != "hyperband" or not ("min_iter" in early or {"max_iter", "s"} <= early.keys()):
        raise UserError(f"{path}: early_terminate: {early}; type hyperband with min_iter, or with max_iter and s")
    first = early["min_iter"] if "min_iter" in early else max(1, early["max_iter"] // eta ** int(early["s"]))
    return Early(first, last, eta)
