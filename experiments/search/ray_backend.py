"""`darkroom sweep --ray`: run the trials of a search on a cluster with Ray Tune."""

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from datamodules.errors import UserError
from experiments import ROOT
from experiments.run.paths import runs_root
from experiments.search.spec import Search
from experiments.search.worker import folder_of, is_exhausted, one_trial, open_study, raise_if_all_failed

MAX_FAILURES = 2  # maximum number of restarts of a trial by Ray, after failures of its machine


def sweep_on_ray(search: Search, storage: str | None, address: str, gpus: float, cores: float) -> optuna.Study:
    """Run trials of a search on a Ray cluster until all are finished.

    Parameters come from the storage, as in `sweep`. Ray and other workers may share a storage, and each can continue a search
    that the other started. All machines must have access to the storage and to the folder of runs.

    Args:
        search: search to run.
        storage: see `experiments.search.worker.sweep`.
        address: address of the cluster; "auto" for the cluster to which this machine belongs, "local" for this machine only.
        gpus: GPUs per trial.
        cores: CPU cores per trial.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached, or any error of `sweep`.
    """
    try:
        import ray
        from ray import tune
    except ImportError:
        raise UserError("sweep: --ray requires Ray Tune. Run pip install 'darkroom[ray]'") from None
    folder = folder_of(search).absolute()
    storage = storage or str(folder / "journal.log")
    storage = storage if "://" in storage else str(Path(storage).absolute())
    study = open_study(search, storage)
    try:
        ray.init(
            address,
            ignore_reinit_error=True,
            include_dashboard=False,
            log_to_driver=True,
            runtime_env={"env_vars": worker_env()},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: {' '.join(str(error).split())}. Check the address") from None
    trainable = partial(ray_trial, search=search, storage=storage)
    while not is_exhausted(search, study):
        finished_before = n_finished(study)
        tune.Tuner(
            tune.with_resources(trainable, {"gpu": gpus, "cpu": cores}),
            tune_config=tune.TuneConfig(num_samples=search.max_trials),
            run_config=tune.RunConfig(
                name="ray", storage_path=str(folder), verbose=0, failure_config=tune.FailureConfig(max_failures=MAX_FAILURES)
            ),
        ).fit()
        raise_if_all_failed(study)
        if n_finished(study) == finished_before:
            raise UserError(f"sweep: Ray finished no trial. See its logs in {folder / 'ray'}")
    ray.shutdown()
    return study


def ray_trial(config: dict[str, Any], search: Search, storage: str) -> None:
    """Run one trial in a Ray process, and report its result to Ray."""
    from ray import tune

    study = open_study(search, storage)
    trial = one_trial(search, study, folder_of(search), threading.Event())
    if trial is not None:
        result = study.get_trials(deepcopy=False)[trial.number]
        tune.report({search.metric: result.value, "state": result.state.name, **trial.params})


def n_finished(study: optuna.Study) -> int:
    """Return the number of finished trials."""
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def worker_env() -> dict[str, str]:
    """Return the environment variables of Ray's processes, with absolute paths."""
    variables = {"DARKROOM_RUNS": str(runs_root().absolute()), "PYTHONPATH": str(ROOT), "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    for key in ("DARKROOM_DATA", "DARKROOM_CACHE"):
        if key in os.environ:
            variables[key] = str(Path(os.environ[key]).absolute())
    return variables
