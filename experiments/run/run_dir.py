"""Run folders: one a run, with all it leaves. Nothing heavy is imported here."""

import itertools
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from callbacks.run.record_file import BrokenRecord, read_record
from datamodules.errors import UserError
from experiments.run.recipes import Recipe


@dataclass(frozen=True)
class Run:
    """A run's folder and what stands where in it."""

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def log(self) -> Path:
        """All logged figures."""
        return self.folder / "metrics.csv"

    @property
    def record(self) -> Path:
        """What the run was and what came of it; written when it has finished."""
        return self.folder / "record.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of last.ckpt and best.ckpt."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of sample pictures."""
        return self.folder / "samples"

    @property
    def finished(self) -> bool:
        """Whether training has reached its budget."""
        record = read_record(self.record) if self.record.exists() else {}
        return "images_seen" in record and record["images_seen"] >= record["config"]["model"]["init_args"]["total_images"]

    @property
    def measured(self) -> bool:
        """Whether its best weights have been measured."""
        return self.finished and "metrics" in read_record(self.record)


def own_name() -> str:
    """How the user calls this command: "darkroom" where that is on the path."""
    if shutil.which("darkroom"):
        return "darkroom"
    if Path(sys.argv[0]).name == "darkroom":
        return sys.argv[0]
    return f"{Path(sys.executable).name} -m experiments"


def runs_root() -> Path:
    """Where runs are kept: the environment variable DARKROOM_RUNS, else `runs` in the current folder."""
    return Path(os.environ.get("DARKROOM_RUNS", "runs"))


def open_run(recipe: Recipe, name: str | None) -> Run:
    """The run of that name, or a new one named by the time (under SLURM or torchrun, by the job, which all processes know).

    The processes that one process launches find its folder in the environment.
    """
    folder = os.environ.get("DARKROOM_RUN_FOLDER")
    if folder and os.environ.get("LOCAL_RANK", "0") != "0":
        return Run(Path(folder))
    if not name and "SLURM_PROCID" in os.environ:  # a batch job or a step, not a shell inside an allocation
        name = os.environ["SLURM_JOB_ID"]
    name = name or os.environ.get("TORCHELASTIC_RUN_ID")
    if name and (Path(name).name != name or name == ".."):
        raise UserError(f"--run {name}: a name, not a path (DARKROOM_RUNS is the folder of all runs)")
    if name == "none":  # torchrun's own default: every such run would be the same
        raise UserError("under torchrun, name the run: --run NAME, or torchrun --rdzv-id NAME")
    parent = runs_root() / recipe.name
    run = Run(parent / name if name else _new_folder(parent))
    os.environ["DARKROOM_RUN_FOLDER"] = str(run.folder)
    return run


def _new_folder(parent: Path) -> Path:
    """A folder named by the time, made here and now, so that no other run takes it."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror} (DARKROOM_RUNS is the folder of all runs)") from None
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count():
        folder = parent / (f"{stamp}_{number}" if number else stamp)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def finished_runs(recipe: Recipe) -> list[Run]:
    """The runs of a recipe that have reached the end of their training and still have their best weights, newest first."""
    records = (runs_root() / recipe.name).glob("*/record.json")
    runs = []
    for path in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        run = Run(path.parent)
        try:
            if run.finished and (run.checkpoints / "best.ckpt").exists():
                runs.append(run)
        except BrokenRecord as error:
            print(f"passed over: {error}", file=sys.stderr)
    return runs
