"""Search specifications: YAML files in W&B's sweep format, read for `darkroom sweep`. This module imports no heavy packages.

The format is W&B's (docs.wandb.ai, "Define a sweep configuration"). Keys that only W&B's agent supports are rejected.
"""

import json
import math
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from experiments.run.recipes import Recipe, find_recipe
from experiments.run.yaml_file import read_yaml

METHODS = ("grid", "random", "bayes")
KEYS = {"name", "description", "program", "command", "method", "metric", "parameters", "early_terminate", "run_cap", "project"}
DISTRIBUTIONS = ("uniform", "int_uniform", "q_uniform", "log_uniform_values")
DEFAULT_MAX_TRIALS = 50  # for random and bayes without run_cap
# Options of `darkroom fit` that a trial sets, or cannot vary.
RESERVED = ("config", "h", "help", "print_config", "run", "wandb")


@dataclass(frozen=True)
class HyperbandSpec:
    """Parameters of Hyperband early stopping.

    Args:
        first: number of validations before a trial can be stopped.
        last: maximum number of validations of a trial; None to determine it from the first trials.
        eta: reduction factor: about one of `eta` trials continues after each decision.
    """

    first: int
    last: int | None
    eta: int


@dataclass(frozen=True)
class Search:
    """Hyperparameter search: recipe, method, metric and search space.

    Args:
        name: name of the search.
        recipe: recipe that each trial trains.
        fixed_args: command-line arguments of every trial, keys and values alternating.
        method: "grid", "random" or "bayes".
        metric: name of a logged metric; the value of a trial is the best value over the validations of its run.
        maximize: whether higher values are better.
        parameters: specification of each command-line key, such as "model.learning_rate", as in the file.
        hyperband: early stopping; None to disable it.
        max_trials: maximum number of trials.
    """

    name: str
    recipe: Recipe
    fixed_args: tuple[str, ...]
    method: str
    metric: str
    maximize: bool
    parameters: dict[str, dict[str, Any]]
    hyperband: HyperbandSpec | None
    max_trials: int

    @property
    def recipe_name(self) -> str:
        """The recipe as an argument of `darkroom fit`."""
        return self.recipe.argument

    @property
    def search_space(self) -> dict[str, dict[str, Any]]:
        """The parameters that are not constant."""
        return {key: spec for key, spec in self.parameters.items() if "value" not in spec}

    @property
    def signature(self) -> str:
        """The settings that must not change while a storage contains trials of this search."""
        settings = [
            self.recipe.name,
            self.recipe.content,
            self.fixed_args,
            self.method,
            self.metric,
            self.maximize,
            self.parameters,
        ]
        return json.dumps(settings, sort_keys=True, default=str)

    def to_argv(self, params: dict[str, Any]) -> list[str]:
        """Return a trial's arguments of `darkroom fit RECIPE`."""
        constants = {key: spec["value"] for key, spec in self.parameters.items() if "value" in spec}
        texts = [
            (key, value if isinstance(value, str) else json.dumps(value)) for key, value in {**constants, **params}.items()
        ]
        return [*self.fixed_args, *(arg for key, text in texts for arg in (f"--{key}", text))]

    def run_name(self, params: dict[str, Any]) -> str:
        """Return the name of a trial's run; equal settings have the same run, which is then resumed."""
        settings = json.dumps([self.recipe.content, self.to_argv(params)], sort_keys=True, default=str)
        return f"{self.name}-{sha256(settings.encode()).hexdigest()[:10]}"


def is_search(path: Path) -> bool:
    """Return whether a file is a search and not a recipe; `read_search` reports errors in the file."""
    return path.suffix in (".yaml", ".yml") and path.is_file() and b"\nparameters:" in path.read_bytes()


def read_search(path: Path, extra_args: list[str], max_trials: int | None = None) -> Search:
    """Read a search from its file.

    Args:
        path: YAML file.
        extra_args: command-line arguments of every trial, such as ["--trainer.devices", "2"].
        max_trials: maximum number of trials; overrides the file's `run_cap`.

    Raises:
        UserError: the file does not exist or is invalid; the message names the key and its value.
    """
    if not path.is_file():
        raise UserError(f"sweep: no file {path}. Check the path; bundled searches are in sweeps/")
    content = read_yaml(path)
    if not isinstance(content, dict) or not {"method", "metric", "parameters", "command"} <= content.keys():
        raise UserError(f"{path}: not a search; it needs `method`, `metric`, `parameters` and `command`")
    if unknown := sorted(content.keys() - KEYS):
        raise UserError(f"{path}: {unknown[0]}: supported only by W&B's agent. Remove it, or use wandb sweep and wandb agent")
    if content["method"] not in METHODS:
        raise UserError(f"{path}: method: {content['method']}; use one of {', '.join(METHODS)}")
    recipe, fixed_args = _parse_command(path, content["command"])
    if not isinstance(content["parameters"], dict) or not content["parameters"]:
        raise UserError(f"{path}: parameters: {content['parameters']}; it must be a map of keys of the recipe")
    parameters = {key: _parse_parameter(path, key, value) for key, value in content["parameters"].items()}
    if duplicates := [arg for arg in split_pairs(extra_args)[::2] if arg.removeprefix("--") in parameters]:
        raise UserError(f"{duplicates[0]}: already a parameter of {path}; remove it from one of the two")
    grid_size = 1
    for key, spec in parameters.items():
        if content["method"] == "grid" and not {"value", "values"} & spec.keys():
            raise UserError(f"{path}: {key}: a grid needs `values`. Add them, or use another method")
        grid_size *= len(spec.get("values", [0]))
    name = content.get("name", path.stem)
    if not isinstance(name, str) or Path(name).name != name or name == ".." or not name.isprintable() or len(name) > 100:
        raise UserError(f"{path}: name: {name}; use a name without directories, of at most 100 characters")
    run_cap = content.get("run_cap")
    if run_cap is not None:
        run_cap = _whole_number(path, "run_cap", run_cap, 1)
    max_trials = max_trials or run_cap or (grid_size if content["method"] == "grid" else DEFAULT_MAX_TRIALS)
    metric = content["metric"]
    if (
        not isinstance(metric, dict)
        or not isinstance(metric.get("name"), str)
        or metric.get("goal", "minimize") not in ("minimize", "maximize")
    ):
        raise UserError(f"{path}: metric: {metric}; it needs a name and a goal, minimize or maximize")
    return Search(
        name=name,
        recipe=recipe,
        fixed_args=(*split_pairs(fixed_args), *split_pairs(extra_args)),
        method=content["method"],
        metric=metric["name"],
        maximize=metric.get("goal") == "maximize",
        parameters=parameters,
        hyperband=_parse_hyperband(path, content.get("early_terminate")),
        max_trials=min(max_trials, grid_size) if content["method"] == "grid" else max_trials,
    )


def _whole_number(path: Path, key: str, value: Any, low: int) -> int:
    """Return a number of the file if it is an integer of at least `low`.

    Raises:
        UserError: it is not.
    """
    if type(value) is not int or value < low:
        raise UserError(f"{path}: {key}: {value}; it must be an integer of at least {low}")
    return value


def _number(value: Any) -> float | int | None:
    """Return a finite number of the file, also one that YAML reads as text, such as 1e-4; None for other values."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _parse_command(path: Path, command: Any) -> tuple[Recipe, list[str]]:
    """Return the recipe and the fixed arguments of W&B's `command`, which runs `darkroom fit RECIPE ... ${args}`."""
    words = list(map(_word, command)) if isinstance(command, list) else []
    if "fit" not in words or words[-1] != "${args}" or words.index("fit") + 1 == len(words) - 1:
        raise UserError(f"{path}: command: {command}; it must end in [fit, RECIPE, ..., '${{args}}']")
    command = words
    recipe, *argv = command[command.index("fit") + 1 : -1]
    if "--wandb" in argv:  # needed only by W&B's agent
        index = argv.index("--wandb")
        del argv[index : index + 2]
    return find_recipe(recipe), argv


def _word(value: Any) -> str:
    """Return a word of `command` as on a command line; numbers, booleans and lists need no quotation marks in the file."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def split_pairs(argv: list[str]) -> list[str]:
    """Return command-line arguments as alternating keys and values, with "--key=value" split.

    Raises:
        UserError: a key has no value or several values.
    """
    pairs = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    if len(pairs) % 2 or any(not key.startswith("--") for key in pairs[::2]):
        raise UserError(f"{' '.join(argv)}: each key of a recipe needs one value, as in --trainer.devices 2")
    return pairs


def _parse_parameter(path: Path, key: str, spec: Any) -> dict[str, Any]:
    """Return {"value"}, {"values"}, or {"distribution", "min", "max"} with "q" for a step size."""
    if key in RESERVED or not isinstance(key, str):
        raise UserError(f"{path}: {key}: not a key of a recipe. Remove it")
    if not isinstance(spec, dict):
        raise UserError(f"{path}: {key}: {spec}; it needs `value`, `values`, or `min` and `max`")
    known = {"value", "values", "distribution"} if {"value", "values"} & spec.keys() else {"min", "max", "q", "distribution"}
    if unknown := sorted(map(str, spec.keys() - known)):
        raise UserError(f"{path}: {key}: {unknown[0]} is not supported. Use {', '.join(sorted(known))}")
    if "values" in spec and (not isinstance(spec["values"], list) or not spec["values"]):
        raise UserError(f"{path}: {key}: values: {spec['values']}; it must be a list of at least one value")
    if "value" in spec or "values" in spec:
        for value in [*spec.get("values", []), spec.get("value")]:
            if isinstance(value, date):
                raise UserError(f"{path}: {key}: {value} is a date in YAML. Write it in quotation marks")
        return {name: spec[name] for name in ("value", "values") if name in spec}
    low, high, step = (_number(spec.get(name)) for name in ("min", "max", "q"))
    if low is None or high is None or low >= high:
        raise UserError(f"{path}: {key}: {spec}; it needs `value`, `values`, or a `min` below its `max`")
    if "q" in spec and (step is None or step <= 0):
        raise UserError(f"{path}: {key}: q: {spec['q']}; it must be greater than 0")
    integer = isinstance(low, int) and isinstance(high, int)
    distribution = spec.get("distribution", "int_uniform" if integer else "uniform")
    if distribution not in DISTRIBUTIONS:
        raise UserError(f"{path}: {key}: distribution: {distribution}; use one of {', '.join(DISTRIBUTIONS)}, or `values`")
    if "q" in spec and distribution != "q_uniform":
        raise UserError(f"{path}: {key}: q: {spec['q']}; it needs distribution: q_uniform")
    if distribution.startswith("log") and low <= 0:
        raise UserError(f"{path}: {key}: min: {low}; {distribution} needs a value greater than 0")
    return {**spec, "min": low, "max": high, "distribution": distribution, **({"q": step} if step else {})}


def _parse_hyperband(path: Path, spec: dict[str, Any] | None) -> HyperbandSpec | None:
    if spec is None:
        return None
    known = isinstance(spec, dict) and spec.get("type") == "hyperband"
    if not known or not ("min_iter" in spec or {"max_iter", "s"} <= spec.keys()):
        raise UserError(f"{path}: early_terminate: {spec}; it needs type hyperband with min_iter, or with max_iter and s")
    lowest = {"eta": 2, "min_iter": 1, "max_iter": 1, "s": 0}
    values = {
        name: _whole_number(path, f"early_terminate.{name}", spec[name], low) for name, low in lowest.items() if name in spec
    }
    eta, last = values.get("eta", 3), values.get("max_iter")
    first = values["min_iter"] if "min_iter" in values else max(1, values["max_iter"] // eta ** values["s"])
    return HyperbandSpec(first, last, eta)
