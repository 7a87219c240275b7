"""`darkroom sweep`: trials of a search, one `darkroom fit` each, shared by workers through a store.

A worker asks the store what to try, runs it as a process of its own (which may launch others: one decision, however many
processes train), and tells the store what came of it. Workers know of each other by the store alone.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from callbacks.run.csv_logger import read_metrics_csv
from callbacks.run.exit_codes import PREEMPTED
from datamodules.errors import UserError
from experiments.run.run_dir import Run, runs_root
from experiments.search.spec import Search

BEAT, EXPIRED = 15, 90  # seconds between a worker's signs of life; without one for so long, its trial is put back
LOOK = 1.0  # seconds between looks at a running trial's log
ATTEMPTS = 5  # to open a database, a second apart
HOPELESS = 3  # trials that fail at once before any has come through
PR_SET_PDEATHSIG = 1  # of sys/prctl.h
SCALAR = (str, int, float, bool, type(None))
CLUSTER = ("SLURM_", "TORCHELASTIC_", "WANDB_SWEEP")
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def sweep(search: Search, store: str | None) -> optuna.Study:
    """Work on a search until it has its trials.

    Args:
        search: what to try.
        store: of all workers: a journal file, or the URL of an SQL database; None for a file in the search's folder.

    Raises:
        Refused: the store has another search of this name, cannot be opened, or the first trials all fail.
        SystemExit: SIGTERM; what was being tried goes on when a worker is started again.
    """
    folder = folder_of(search)
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(search, store)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    while not stop.is_set():
        if one_trial(search, study, folder, stop) is None:
            refuse_if_hopeless(study, enough=1)
            return study
    print("Stopped; nothing is lost. The same command goes on.", flush=True)
    raise SystemExit(PREEMPTED)


def one_trial(search: Search, study: optuna.Study, folder: Path, stop: threading.Event) -> Trial | None:
    """What a worker does, once: put back what is lost, try what is next, tell what came of it; None if nothing is left.

    Raises:
        Refused: the first trials have all failed.
    """
    put_back(study)
    trial = next_trial(search, study)
    if trial is not None:
        with signs_of_life(trial):
            attempt(search, study, trial, folder, stop)
        refuse_if_hopeless(study)
    return trial


def folder_of(search: Search) -> Path:
    """Where a search leaves its store, its trials' output and its report."""
    return runs_root() / "sweeps" / search.name


# The store


def open_study(search: Search, store: str | None) -> optuna.Study:
    """The search's study in the store, begun if it is not there.

    Raises:
        Refused: see `sweep`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if search.early:
        pruner = optuna.pruners.HyperbandPruner(search.early.first, search.early.last or "auto", search.early.eta)
    try:
        study = begun(search, store or str(folder_of(search) / "journal.log"), pruner)
    except (OSError, ImportError, SQLAlchemyError) as error:
        raise UserError(f"--store {store}: {' '.join(str(error).split())}") from None
    began = study.user_attrs.get("search")
    if began is None:
        study.set_user_attr("search", search.essence)
    elif began != search.essence:
        raise UserError(f"'{search.name}' was begun as another search; give the file another `name`, or take another --store")
    return study


def begun(search: Search, store: str, pruner: optuna.pruners.BasePruner) -> optuna.Study:
    """The study, by whichever worker comes first: of two that make a database's tables at once, one is refused by it."""
    for left in reversed(range(ATTEMPTS)):
        try:
            return optuna.create_study(
                storage=opened(store),
                sampler=sampler_of(search),
                pruner=pruner,
                study_name=search.name,
                direction="maximize" if search.maximise else "minimize",
                load_if_exists=True,
            )
        except DBAPIError:
            if not left:
                raise
            time.sleep(1)
    raise AssertionError("unreachable")


def sampler_of(search: Search) -> optuna.samplers.BaseSampler:
    """What chooses: every combination, blindly, or from what came of earlier trials (TPE, Bergstra et al., 2011)."""
    if search.method == "grid":
        return Grid(search)
    return optuna.samplers.RandomSampler() if search.method == "random" else optuna.samplers.TPESampler()


def opened(store: str) -> BaseStorage:
    """A journal file, which may lie on a shared file system, or an SQL database by its URL."""
    if "://" in store:
        return RDBStorage(store)
    Path(store).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(store))


def put_back(study: optuna.Study) -> None:
    """Let trials be tried again whose worker has given no sign of life for too long."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        assert trial.datetime_start is not None
        beat = trial.user_attrs.get("beat", trial.datetime_start.timestamp())
        if time.time() - beat > EXPIRED:
            again(study, trial)


def again(study: optuna.Study, trial: FrozenTrial | Trial) -> None:
    """Let a trial be tried again, unless another worker has seen to it."""
    if told(study, trial.number, state=TrialState.FAIL):
        study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
        print(f"trial {trial.number} is put back", flush=True)


def told(study: optuna.Study, number: int, value: float | None = None, state: TrialState | None = None) -> bool:
    """Tell the store what came of a trial; false if that was told already, as by a worker that thought this one dead."""
    try:
        study.tell(number, value, state)
    except (ValueError, UpdateFinishedTrialError):
        if study.get_trials(deepcopy=False)[number].state.is_finished():
            return False
        raise
    return True


def next_trial(search: Search, study: optuna.Study) -> Trial | None:
    """What to try now; None if enough has been tried."""
    if none_left(search, study):
        return None
    trial = study.ask(distributions(search))
    if "again" in trial.user_attrs or place(study, trial.number) < search.cap:
        return trial
    trial.set_user_attr("beyond", True)  # another worker has taken the last one
    told(study, trial.number, state=TrialState.FAIL)
    return None


def none_left(search: Search, study: optuna.Study) -> bool:
    """Whether each of the trials has been tried, or is being tried somewhere."""
    trials = study.get_trials(deepcopy=False)
    return not any(trial.state == TrialState.WAITING for trial in trials) and place(study, len(trials)) >= search.cap


def place(study: optuna.Study, number: int) -> int:
    """How many trials stand before a number, without those that were put back or came too late."""
    before = study.get_trials(deepcopy=False)[:number]
    return sum(1 for trial in before if "again" not in trial.user_attrs and "beyond" not in trial.user_attrs)


class Grid(optuna.samplers.BaseSampler):
    """Every combination once, in the order of the file: a trial's is a function of its place among them."""

    def __init__(self, search: Search) -> None:
        self.values = {key: choices(range_) for key, range_ in search.searched.items()}

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Each parameter by itself."""
        return {}

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """See `infer_relative_search_space`."""
        return {}

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """The parameter's digit in the place's number; the last one changes fastest."""
        at = place(study, trial.number)
        for key in reversed(self.values):
            at, digit = divmod(at, len(self.values[key]))
            if key == param_name:
                return self.values[key][digit]
        raise AssertionError(param_name)


def distributions(search: Search) -> dict[str, BaseDistribution]:
    """Optuna's names for W&B's."""
    return {key: distribution(range_) for key, range_ in search.searched.items()}


def distribution(range_: dict[str, Any]) -> BaseDistribution:
    """Of one parameter."""
    if "values" in range_:
        return CategoricalDistribution(choices(range_))
    low, high = range_["min"], range_["max"]
    if range_["distribution"] == "int_uniform":
        return IntDistribution(low, high)
    step = range_.get("q", 1) if range_["distribution"] == "q_uniform" else None
    return FloatDistribution(low, high, log=range_["distribution"] == "log_uniform_values", step=step)


def choices(range_: dict[str, Any]) -> list[Any]:
    """The values of a parameter as the store can keep them: lists as text."""
    return [value if isinstance(value, SCALAR) else json.dumps(value) for value in range_["values"]]


# A trial


def attempt(search: Search, study: optuna.Study, trial: Trial, folder: Path, stop: threading.Event) -> None:
    """Train as the trial says, report its figures while it runs, and tell what came of it."""
    run = Run(runs_root() / search.recipe.name / search.run_name(trial.params))
    trial.set_user_attr("run", run.folder.name)
    output = folder / f"{run.folder.name}.txt"
    said = "  ".join(f"{key} {value}" for key, value in trial.params.items())
    print(f"trial {trial.number}  {said}", flush=True)
    wait_until_free(run, stop)
    if stop.is_set():
        again(study, trial)
        return
    status, pruned = (0, False) if run.finished else trained(search, trial, run, output, stop)
    values = figures(search, run)
    if (status == PREEMPTED or (status and stop.is_set())) and not pruned:
        again(study, trial)
    elif status and not pruned:
        trial.set_user_attr("reason", last_line(output) or f"ended with status {status}")
        told(study, trial.number, state=TrialState.FAIL)
        print(f"trial {trial.number}  failed: {trial.user_attrs['reason']}  ({output})", flush=True)
    elif not values:
        logged = sorted({row["name"] for row in read_metrics_csv(run.log) if "/" in row["name"]})
        told(study, trial.number, state=TrialState.FAIL)
        raise UserError(
            f"metric: no figure '{search.metric}' is logged by {search.recipe.name}; these are: {', '.join(logged)}"
        )
    else:
        value = (max if search.maximise else min)(values)
        told(study, trial.number, None if pruned else value, TrialState.PRUNED if pruned else TrialState.COMPLETE)
        print(f"trial {trial.number}  {search.metric} {value:.6g}{'  (ended early)' if pruned else ''}", flush=True)


def wait_until_free(run: Run, stop: threading.Event) -> None:
    """A worker that was thought dead may still train the very run; its result is then this trial's too."""
    while run.folder.exists() and not stop.is_set():
        try:
            with FileLock(run.folder / ".lock", blocking=False):
                return
        except Timeout:
            stop.wait(LOOK)


def trained(search: Search, trial: Trial, run: Run, output: Path, stop: threading.Event) -> tuple[int, bool]:
    """Run `darkroom fit` in a process of its own; its exit status, and whether the search had it end early."""
    words = ["fit", search.recipe_name, "--run", run.folder.name, *search.words(trial.params)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(CLUSTER) and key not in RANKS}
    with output.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "experiments", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=end_with_worker,
        )
    reported, asked, pruned = 0, False, False
    while True:
        with suppress(subprocess.TimeoutExpired):
            child.wait(LOOK)
        for value in figures(search, run)[reported:]:
            reported += 1
            trial.report(value, reported)
        if child.returncode is not None:
            return child.returncode, pruned
        pruned = pruned or (reported > 0 and trial.should_prune())
        if (pruned or stop.is_set()) and not asked:
            child.send_signal(signal.SIGTERM)
            asked = True


def end_with_worker() -> None:
    """Where the system can: let a worker's SIGKILL reach its trial, which would train on for nobody."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def figures(search: Search, run: Run) -> list[float]:
    """The metric at the validations so far."""
    rows = read_metrics_csv(run.log) if run.log.exists() else []
    return [float(row["value"]) for row in rows if row["name"] == search.metric]


def last_line(output: Path) -> str:
    """What a trial said last."""
    lines = output.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def signs_of_life(trial: Trial) -> Iterator[None]:
    """Tell the store regularly that this worker is there."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            trial.set_user_attr("beat", time.time())

    trial.set_user_attr("beat", time.time())
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def refuse_if_hopeless(study: optuna.Study, enough: int = HOPELESS) -> None:
    """Do not go on when so many trials have ended, and all of them have failed."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
    if len(reasons) >= enough and not any(trial.state != TrialState.FAIL for trial in trials):
        raise UserError(f"all {len(reasons)} trials so far failed; the last: {reasons[-1]}")
