"""Search specifications: YAML files in W&B's sweep format, read for `darkroom sweep`. This module imports no heavy packages.

The format is W&B's (docs.wandb.ai, "Define a sweep configuration"). Keys that only W&B's agent supports are rejected.
"""

import json
from dataclasses import dataclass
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
        return self.recipe.name if self.recipe.bundled else str(self.recipe.path)

    @property
    def search_space(self) -> dict[str, dict[str, Any]]:
        """The parameters that are not constant."""
        return {key: spec for key, spec in self.parameters.items() if "value" not in spec}

    @property
    def signature(self) -> str:
        """The settings that must not change while a storage contains trials of this search."""
        settings = [self.recipe.name, self.fixed_args, self.method, self.metric, self.maximize, self.parameters]
        return json.dumps(settings, sort_keys=True)

    def to_argv(self, params: dict[str, Any]) -> list[str]:
        """Return a trial's arguments of `darkroom fit RECIPE`."""
        constants = {key: spec["value"] for key, spec in self.parameters.items() if "value" in spec}
        texts = [
            (key, value if isinstance(value, str) else json.dumps(value)) for key, value in {**constants, **params}.items()
        ]
        return [*self.fixed_args, *(arg for key, text in texts for arg in (f"--{key}", text))]

    @property
    def example_argv(self) -> list[str]:
        """The arguments of a trial with the first value of each parameter, for validating the keys."""
        return self.to_argv({key: spec.get("values", [spec.get("min")])[0] for key, spec in self.search_space.items()})

    def run_name(self, params: dict[str, Any]) -> str:
        """Return the name of a trial's run; equal parameters have the same run, which is then resumed."""
        return f"{self.name}-{sha256(json.dumps(self.to_argv(params)).encode()).hexdigest()[:10]}"


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
    parameters = {key: _parse_parameter(path, key, value) for key, value in content["parameters"].items()}
    if duplicates := [arg for arg in split_pairs(extra_args)[::2] if arg.removeprefix("--") in parameters]:
        raise UserError(f"{duplicates[0]}: already a parameter of {path}; remove it from one of the two")
    grid_size = 1
    for key, spec in parameters.items():
        if content["method"] == "grid" and not {"value", "values"} & spec.keys():
            raise UserError(f"{path}: {key}: a grid needs `values`. Add them, or use another method")
        grid_size *= len(spec.get("values", [0]))
    name = str(content.get("name", path.stem))
    if Path(name).name != name:
        raise UserError(f"{path}: name: {name}; use a name without directories")
    max_trials = max_trials or content.get("run_cap", grid_size if content["method"] == "grid" else DEFAULT_MAX_TRIALS)
    metric = content["metric"]
    if not isinstance(metric, dict) or "name" not in metric or metric.get("goal", "minimize") not in ("minimize", "maximize"):
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


def _parse_command(path: Path, command: list[str]) -> tuple[Recipe, list[str]]:
    """Return the recipe and the fixed arguments of W&B's `command`, which runs `darkroom fit RECIPE ... ${args}`."""
    if "fit" not in command or command[-1] != "${args}" or command.index("fit") + 1 == len(command) - 1:
        raise UserError(f"{path}: command: {command}; it must end in [fit, RECIPE, ..., '${{args}}']")
    recipe, *argv = command[command.index("fit") + 1 : -1]
    if "--wandb" in argv:  # needed only by W&B's agent
        index = argv.index("--wandb")
        del argv[index : index + 2]
    return find_recipe(recipe), argv


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
    if not isinstance(spec, dict):
        raise UserError(f"{path}: {key}: {spec}; it needs `value`, `values`, or `min` and `max`")
    if "value" in spec or spec.get("values"):
        return {name: spec[name] for name in ("value", "values") if name in spec}
    low, high = spec.get("min"), spec.get("max")
    if not isinstance(low, int | float) or not isinstance(high, int | float) or low >= high:
        raise UserError(f"{path}: {key}: {spec}; it needs `value`, `values`, or a `min` below its `max`")
    integer = isinstance(low, int) and isinstance(high, int)
    distribution = spec.get("distribution", "int_uniform" if integer else "uniform")
    if distribution not in DISTRIBUTIONS:
        raise UserError(f"{path}: {key}: distribution: {distribution}; use one of {', '.join(DISTRIBUTIONS)}, or `values`")
    return {**spec, "distribution": distribution}


def _parse_hyperband(path: Path, spec: dict[str, Any] | None) -> HyperbandSpec | None:
    if spec is None:
        return None
    eta, last = int(spec.get("eta", 3)), spec.get("max_iter")
    if spec.get("type") != "hyperband" or not ("min_iter" in spec or {"max_iter", "s"} <= spec.keys()):
        raise UserError(f"{path}: early_terminate: {spec}; it needs type hyperband with min_iter, or with max_iter and s")
    first = spec["min_iter"] if "min_iter" in spec else max(1, spec["max_iter"] // eta ** int(spec["s"]))
    return HyperbandSpec(first, last, eta)
