"""`darkroom sweep`: run the trials of a search, one `darkroom fit` each, in workers that share an Optuna storage.

A worker takes the next trial from the storage, runs it in a child process, and stores the result. The child process may launch
further ranks; the worker decides about early stopping for all of them. Workers communicate only through the storage.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from callbacks.run.csv_logger import read_metrics_csv
from callbacks.run.exit_codes import PREEMPTED, REQUEUE_FILE
from datamodules.errors import UserError
from experiments.run.lock import RunInUse, locked
from experiments.run.paths import runs_root
from experiments.run.run_dir import Run
from experiments.search.samplers import distributions, make_sampler, ordinal
from experiments.search.spec import Search

HEARTBEAT_S, STALE_S = 15, 90  # seconds between a worker's heartbeats; seconds without one until its trial is requeued
LOCK_TIMEOUT_S = 120  # seconds that a worker waits for a locked SQLite file
POLL_S = 1.0  # seconds between two checks of a running trial
OPEN_ATTEMPTS = 5  # attempts to open a database, one second apart
MAX_INITIAL_FAILURES = 3  # failed trials after which a search without any success is aborted
PR_SET_PDEATHSIG = 1  # from sys/prctl.h
LAUNCHER_PREFIXES = ("SLURM_", "TORCHELASTIC_", "WANDB_SWEEP")
JOB_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
)  # with which a trial holds the lock of its run
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def sweep(search: Search, storage: str | None) -> optuna.Study:
    """Run trials of a search until all are finished.

    Args:
        search: search to run.
        storage: journal file or URL of an SQL database that the workers share; None for a file in the search's folder.

    Raises:
        UserError: the storage cannot be opened or contains another search of this name, or the first trials all fail.
        SystemExit: a signal stopped the worker; its trial is requeued and resumed by the next worker.
    """
    folder = folder_of(search)
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(search, storage)
    stop = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signal_number, lambda *_: stop.set())
    while not stop.is_set():
        if one_trial(search, study, folder, stop) is None and not wait_for_others(study, stop):
            raise_if_all_failed(study, min_failures=1)
            return study
    print("Stopped. Run the same command to resume.", flush=True)
    raise SystemExit(PREEMPTED)


def wait_for_others(study: optuna.Study, stop: threading.Event) -> bool:
    """Wait for a heartbeat or the end of the trials that still run, and return whether a worker of one has died.

    Its trial can then be requeued. Without this, a single worker that is killed and started again would leave its trial.
    """
    silent = heartbeats(study)
    if silent:
        print(f"waiting   for a sign of life of trial {', '.join(map(str, sorted(silent)))}", flush=True)
    deadline = time.monotonic() + STALE_S + 1
    while silent and time.monotonic() < deadline and not stop.is_set():
        stop.wait(POLL_S)
        newest = heartbeats(study)
        silent = {number: beat for number, beat in silent.items() if number in newest and newest[number] == beat}
    return bool(silent)


def heartbeats(study: optuna.Study) -> dict[int, float | None]:
    """Return the last heartbeat of each running trial by its number."""
    running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    return {trial.number: trial.user_attrs.get("heartbeat") for trial in running}


def one_trial(search: Search, study: optuna.Study, folder: Path, stop: threading.Event) -> Trial | None:
    """Requeue stale trials, then run the next trial and store its result. Return the trial, or None if none is left.

    Raises:
        UserError: the first trials all failed.
    """
    requeue_stale(study)
    trial = next_trial(search, study)
    if trial is not None:
        with heartbeat(trial):
            run_trial(search, study, trial, folder, stop)
        raise_if_all_failed(study)
    return trial


def folder_of(search: Search) -> Path:
    """Return the folder of a search's storage, trial output and report."""
    return runs_root() / "sweeps" / search.name


# Storage


def open_study(search: Search, storage: str | None) -> optuna.Study:
    """Load the search's study from the storage, or create it.

    Raises:
        UserError: see `sweep`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if search.hyperband:
        pruner = optuna.pruners.HyperbandPruner(search.hyperband.first, search.hyperband.last or "auto", search.hyperband.eta)
    try:
        study = create_or_load_study(search, storage or str(folder_of(search) / "journal.log"), pruner)
        stored_signature = study.user_attrs.get("search")
        if stored_signature is None:
            study.set_user_attr("search", search.signature)
        study.get_trials(deepcopy=False)
    except (OSError, ImportError, SQLAlchemyError) as error:
        raise UserError(f"--storage {storage or 'of the search'}: {' '.join(str(error).split())}") from None
    except (ValueError, TypeError, KeyError, AssertionError) as error:  # raised by Optuna for a damaged journal
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--storage {storage or folder_of(search) / 'journal.log'}: damaged ({reason}). Restore it") from None
    if stored_signature not in (None, search.signature):
        raise UserError(
            f"--storage {storage or folder_of(search) / 'journal.log'}: '{search.name}' exists with other settings. "
            "Change `name` in the file, or use another storage"
        )
    return study


def create_or_load_study(search: Search, storage: str, pruner: optuna.pruners.BasePruner) -> optuna.Study:
    """Create the study, or load it if it exists.

    Database errors are retried: if two workers create the tables at the same time, the database rejects one of them.
    """
    for attempts_left in reversed(range(OPEN_ATTEMPTS)):
        try:
            return optuna.create_study(
                storage=open_storage(storage),
                sampler=make_sampler(search),
                pruner=pruner,
                study_name=search.name,
                direction="maximize" if search.maximize else "minimize",
                load_if_exists=True,
            )
        except DBAPIError:
            if not attempts_left:
                raise
            time.sleep(1)
    raise AssertionError("unreachable")


def open_storage(storage: str) -> BaseStorage:
    """Open an SQL database by its URL, or a journal file, which may be on a shared file system."""
    if "://" in storage:
        wait = {"connect_args": {"timeout": LOCK_TIMEOUT_S}} if storage.startswith("sqlite") else {}
        return RDBStorage(storage, engine_kwargs=wait)
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(storage))


def requeue_stale(study: optuna.Study) -> None:
    """Requeue running trials whose last heartbeat is older than `STALE_S`."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        assert trial.datetime_start is not None
        last_heartbeat = trial.user_attrs.get("heartbeat", trial.datetime_start.timestamp())
        if time.time() - last_heartbeat > STALE_S:
            requeue(study, trial)


def requeue(study: optuna.Study, trial: FrozenTrial | Trial) -> None:
    """Fail a trial and enqueue its parameters again, unless another worker has finished it."""
    if tell_once(study, trial.number, state=TrialState.FAIL):
        study.enqueue_trial(trial.params, user_attrs={"requeued_from": trial.number})
        print(f"trial {trial.number} is requeued", flush=True)


def tell_once(study: optuna.Study, number: int, value: float | None = None, state: TrialState | None = None) -> bool:
    """Store a trial's result, and return whether it was stored.

    It is not stored if the trial is already finished, for example by a worker that considered this worker dead.
    """
    try:
        study.tell(number, value, state)
    except (ValueError, UpdateFinishedTrialError):
        if study.get_trials(deepcopy=False)[number].state.is_finished():
            return False
        raise
    return True


def next_trial(search: Search, study: optuna.Study) -> Trial | None:
    """Return the next trial; None if the search is exhausted."""
    if is_exhausted(search, study):
        return None
    trial = study.ask(distributions(search))
    if "requeued_from" in trial.user_attrs or ordinal(study, trial.number) < search.max_trials:
        return trial
    trial.set_user_attr("over_budget", True)  # another worker started the last trial in the meantime
    tell_once(study, trial.number, state=TrialState.FAIL)
    return None


def is_exhausted(search: Search, study: optuna.Study) -> bool:
    """Return whether all trials are finished or running."""
    trials = study.get_trials(deepcopy=False)
    return not any(trial.state == TrialState.WAITING for trial in trials) and ordinal(study, len(trials)) >= search.max_trials


# Trials


def run_trial(search: Search, study: optuna.Study, trial: Trial, folder: Path, stop: threading.Event) -> None:
    """Train with the trial's parameters, report metrics during training, and store the result.

    Raises:
        UserError: the run does not log the metric of the search.
    """
    run = Run(runs_root() / search.recipe.name / search.run_name(trial.params))
    trial.set_user_attr("run", run.folder.name)
    output = folder / f"{run.folder.name}.txt"
    params = "  ".join(f"{key} {value}" for key, value in trial.params.items())
    print(f"trial {trial.number}  {params}", flush=True)
    wait_until_free(run, stop)
    if stop.is_set():
        requeue(study, trial)
        return
    status, pruned = (0, False) if run.finished else run_fit(search, trial, run, output, stop)
    values = metric_values(search, run)
    if (status == PREEMPTED or (status and stop.is_set())) and not pruned:
        requeue(study, trial)
    elif status and not pruned:
        trial.set_user_attr("reason", last_line(output) or f"ended with status {status}")
        tell_once(study, trial.number, state=TrialState.FAIL)
        print(f"trial {trial.number}  failed: {trial.user_attrs['reason']}  ({output})", flush=True)
    elif values and not any(map(math.isfinite, values)):
        trial.set_user_attr("reason", f"{search.metric} is never a finite number")
        tell_once(study, trial.number, state=TrialState.FAIL)
        print(f"trial {trial.number}  failed: {trial.user_attrs['reason']}  ({output})", flush=True)
    elif not values:
        logged = sorted({row["name"] for row in read_metrics_csv(run.log) if "/" in row["name"]})
        tell_once(study, trial.number, state=TrialState.FAIL)
        raise UserError(f"metric: '{search.metric}' is not logged by {search.recipe.name}. Use one of: {', '.join(logged)}")
    else:
        value = (max if search.maximize else min)(filter(math.isfinite, values))
        tell_once(study, trial.number, None if pruned else value, TrialState.PRUNED if pruned else TrialState.COMPLETE)
        print(f"trial {trial.number}  {search.metric} {value:.6g}{'  (ended early)' if pruned else ''}", flush=True)


def wait_until_free(run: Run, stop: threading.Event) -> None:
    """Wait until no other process holds the lock of a run, or `stop` is set.

    A worker that was considered dead may still train the run; its result is then used.
    """
    while run.folder.exists() and not stop.is_set():
        try:
            with locked(run.folder, wait_s=0):
                return
        except RunInUse:
            stop.wait(POLL_S)


def run_fit(search: Search, trial: Trial, run: Run, output: Path, stop: threading.Event) -> tuple[int, bool]:
    """Run `darkroom fit` in a child process; return its exit status and whether the trial was pruned."""
    argv = ["fit", search.recipe_name, "--run", run.folder.name, *search.to_argv(trial.params)]
    left_out = {*RANK_VARIABLES, REQUEUE_FILE}  # a trial that is ended early requests no requeue of the worker's job
    environment = {
        key: value
        for key, value in os.environ.items()
        if key in JOB_VARIABLES or not (key.startswith(LAUNCHER_PREFIXES) or key in left_out)
    }
    with output.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "experiments", *argv],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=exit_with_worker,
        )
    reported, terminated, pruned = 0, False, False
    while True:
        with suppress(subprocess.TimeoutExpired):
            child.wait(POLL_S)
        for value in metric_values(search, run)[reported:]:
            reported += 1
            if math.isfinite(value):  # the storage accepts no other numbers
                trial.report(value, reported)
        if child.returncode is not None:
            return child.returncode, pruned
        pruned = pruned or (reported > 0 and trial.should_prune())
        if (pruned or stop.is_set()) and not terminated:
            child.send_signal(signal.SIGTERM)
            terminated = True


def exit_with_worker() -> None:
    """Request that the kernel kills this process when its worker is killed (Linux only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def metric_values(search: Search, run: Run) -> list[float]:
    """Return the search's metric at each validation of a run."""
    rows = read_metrics_csv(run.log) if run.log.exists() else []
    return [float(row["value"]) for row in rows if row["name"] == search.metric]


def last_line(output: Path) -> str:
    """Return the last non-empty line of a trial's output."""
    lines = output.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def heartbeat(trial: Trial) -> Iterator[None]:
    """Store the time every `HEARTBEAT_S` seconds while a trial runs."""
    finished = threading.Event()

    def beat() -> None:
        while not finished.wait(HEARTBEAT_S):
            trial.set_user_attr("heartbeat", time.time())

    trial.set_user_attr("heartbeat", time.time())
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def raise_if_all_failed(study: optuna.Study, min_failures: int = MAX_INITIAL_FAILURES) -> None:
    """Raise a UserError if at least `min_failures` trials have failed and none has succeeded."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
    if len(reasons) >= min_failures and not any(trial.state != TrialState.FAIL for trial in trials):
        raise UserError(f"all {len(reasons)} trials so far failed; the last: {reasons[-1]}")
