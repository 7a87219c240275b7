"""`darkroom sweep --ray`: a search whose trials Ray Tune places on the machines of a cluster."""

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from datamodules.errors import UserError
from experiments import ROOT
from experiments.run.run_dir import runs_root
from experiments.search.spec import Search
from experiments.search.worker import folder_of, none_left, one_trial, open_study, refuse_if_hopeless

DEATHS = 2  # of a trial's machine that Ray makes up for


def sweep_on_ray(search: Search, store: str | None, address: str, gpus: float, cores: float) -> optuna.Study:
    """Let a Ray cluster work on a search until it has its trials.

    What to try comes from the store, as for any worker: Ray and workers elsewhere may share it, and a search that was begun by
    one goes on by the other. The machines share the folder of runs and the store.

    Args:
        search: what to try.
        store: see `experiments.search.worker.sweep`.
        address: of the cluster; "auto" for the one that this machine belongs to, "local" for this machine alone.
        gpus: that a trial needs.
        cores: that a trial needs.

    Raises:
        Refused: Ray is not installed, there is no such cluster, or as `sweep` does.
    """
    try:
        import ray
        from ray import tune
    except ImportError:
        raise UserError("sweep: --ray needs Ray Tune: pip install 'darkroom[ray]'") from None
    folder = folder_of(search).absolute()
    store = store or str(folder / "journal.log")
    store = store if "://" in store else str(Path(store).absolute())
    study = open_study(search, store)
    try:
        ray.init(
            address, ignore_reinit_error=True, include_dashboard=False, log_to_driver=True, runtime_env={"env_vars": places()}
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: {' '.join(str(error).split())}") from None
    tried = partial(on_a_machine, search=search, store=store)
    while not none_left(search, study):
        before = told(study)
        tune.Tuner(
            tune.with_resources(tried, {"gpu": gpus, "cpu": cores}),
            tune_config=tune.TuneConfig(num_samples=search.cap),
            run_config=tune.RunConfig(
                name="ray", storage_path=str(folder), verbose=0, failure_config=tune.FailureConfig(max_failures=DEATHS)
            ),
        ).fit()
        refuse_if_hopeless(study)
        if told(study) == before:
            raise UserError(f"sweep: Ray has tried nothing; its own logs are in {folder / 'ray'}")
    ray.shutdown()
    return study


def on_a_machine(config: dict[str, Any], search: Search, store: str) -> None:
    """One trial, in a process of Ray's."""
    from ray import tune

    study = open_study(search, store)
    trial = one_trial(search, study, folder_of(search), threading.Event())
    if trial is not None:
        ended = study.get_trials(deepcopy=False)[trial.number]
        tune.report({search.metric: ended.value, "state": ended.state.name, **trial.params})


def told(study: optuna.Study) -> int:
    """How many trials have ended."""
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def places() -> dict[str, str]:
    """Of the environment, what each of Ray's processes needs; paths of this machine's folder in full."""
    found = {"DARKROOM_RUNS": str(runs_root().absolute()), "PYTHONPATH": str(ROOT), "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    for key in ("DARKROOM_DATA", "DARKROOM_CACHE"):
        if key in os.environ:
            found[key] = str(Path(os.environ[key]).absolute())
    return found
