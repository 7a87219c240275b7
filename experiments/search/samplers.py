"""Samplers of a search's parameters: grid, random and Bayesian, with Optuna's distributions."""

import json
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from experiments.search.spec import Search

SCALAR = (str, int, float, bool, type(None))


def make_sampler(search: Search) -> optuna.samplers.BaseSampler:
    """Return the sampler of the search's method: grid, random, or TPE (Bergstra et al., 2011) for bayes."""
    if search.method == "grid":
        return GridSampler(search)
    return optuna.samplers.RandomSampler() if search.method == "random" else optuna.samplers.TPESampler()


def ordinal(study: optuna.Study, number: int) -> int:
    """Return the number of trials before a trial number, without requeued trials and trials over budget."""
    earlier = study.get_trials(deepcopy=False)[:number]
    return sum(1 for trial in earlier if "requeued_from" not in trial.user_attrs and "over_budget" not in trial.user_attrs)


class GridSampler(optuna.samplers.BaseSampler):
    """Sampler of each combination once, in the order of the file; the combination of a trial is a function of its ordinal."""

    def __init__(self, search: Search) -> None:
        self.values = {key: choices(spec) for key, spec in search.search_space.items()}

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return no parameters: all are sampled independently."""
        return {}

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """See `infer_relative_search_space`."""
        return {}

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """Return the parameter's digit of the ordinal in mixed radix; the last parameter changes fastest."""
        remaining = ordinal(study, trial.number)
        for key in reversed(self.values):
            remaining, digit = divmod(remaining, len(self.values[key]))
            if key == param_name:
                return self.values[key][digit]
        raise AssertionError(param_name)


def distributions(search: Search) -> dict[str, BaseDistribution]:
    """Convert the search space to Optuna's distributions."""
    return {key: distribution(spec) for key, spec in search.search_space.items()}


def distribution(spec: dict[str, Any]) -> BaseDistribution:
    """Convert one parameter to Optuna's distribution."""
    if "values" in spec:
        return CategoricalDistribution(choices(spec))
    low, high = spec["min"], spec["max"]
    if spec["distribution"] == "int_uniform":
        return IntDistribution(low, high)
    step = spec.get("q", 1) if spec["distribution"] == "q_uniform" else None
    if step and all(isinstance(value, int) for value in (low, high, step)):
        return IntDistribution(low, high, step=step)
    return FloatDistribution(low, high, log=spec["distribution"] == "log_uniform_values", step=step)


def examples(search: Search) -> list[list[str]]:
    """Return arguments of trials that contain each value of each parameter, or both ends of its range, for validation."""
    values = {key: spec.get("values") or ends(distribution(spec)) for key, spec in search.search_space.items()}
    count = max(map(len, values.values()), default=1)
    return [search.to_argv({key: known[i % len(known)] for key, known in values.items()}) for i in range(count)]


def ends(space: BaseDistribution) -> list[int] | list[float]:
    """Return both ends of a range, in the type of its values."""
    assert isinstance(space, IntDistribution | FloatDistribution)
    return [space.low, space.high]


def choices(spec: dict[str, Any]) -> list[Any]:
    """Return a parameter's values in types that the storage supports: lists as JSON text."""
    return [value if isinstance(value, SCALAR) else json.dumps(value) for value in spec["values"]]
