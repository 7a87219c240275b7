"""Run folders: one for each run, with all of its outputs. This module does not import torch, so that the CLI starts fast."""

import itertools
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.run.record_file import BrokenRecord, read_record
from datamodules.errors import UserError
from experiments.run.paths import runs_root
from experiments.run.recipes import Recipe
from experiments.run.yaml_file import read_yaml


@dataclass(frozen=True)
class Run:
    """A run's folder and the paths of its outputs."""

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    def read_config(self) -> dict[str, Any]:
        """Read the resolved configuration.

        Raises:
            UserError: the file is missing, damaged, or not the configuration of a run.
        """
        content = read_yaml(self.config)
        sections = [content.get(key) for key in ("model", "data")] if isinstance(content, dict) else [None]
        if not all(isinstance(section, dict) and isinstance(section.get("init_args"), dict) for section in sections):
            raise UserError(f"{self.config}: not the configuration of a run. Restore the file, or choose another --run")
        return content

    @property
    def log(self) -> Path:
        """The logged values, a CSV file."""
        return self.folder / "metrics.csv"

    @property
    def record(self) -> Path:
        """The run record: configuration, code, data and metrics; written when training has finished."""
        return self.folder / "record.json"

    @property
    def image_table(self) -> Path:
        """The test results of each image, a CSV file."""
        return self.folder / "test_images.csv"

    @property
    def checkpoints(self) -> Path:
        """Folder of last.ckpt and best.ckpt."""
        return self.folder / "checkpoints"

    @property
    def best_checkpoint(self) -> Path:
        """The best weights, or those of the last validation if the recipe has no monitor; written at validations."""
        return self.checkpoints / "best.ckpt"

    @property
    def samples(self) -> Path:
        """Folder of preview images."""
        return self.folder / "samples"

    @property
    def code(self) -> Path:
        """Folder of copies of the user's Python files that the run uses."""
        return self.folder / "code"

    def check_writable(self) -> None:
        """Check that every output can be written, so that no training is lost at its first validation.

        Raises:
            UserError: a file is in the place of a folder, a folder in that of a file, or one of them is read-only.
        """
        folders = (self.folder, self.checkpoints, self.samples, self.code, self.folder / "tensorboard", self.folder / "wandb")
        locks = (self.folder / ".lock", self.folder / ".lock-holder")
        files = (self.config, self.log, self.record, self.image_table, self.best_checkpoint, *locks)
        for path in (*folders, *files):
            if path.exists() and path.is_dir() != (path in folders):
                kind = "a folder" if path.is_dir() else "a file"
                raise UserError(f"{path} is {kind}. Move it, or choose another --run")
            if path.exists() and not os.access(path, os.W_OK):
                raise UserError(f"cannot write to {path}. Change its permissions, or choose another --run")

    @property
    def finished(self) -> bool:
        """Whether training has reached its image budget."""
        record = read_record(self.record) if self.record.exists() else {}
        if "images_seen" not in record:
            return False
        try:
            return bool(record["images_seen"] >= record["config"]["model"]["init_args"]["total_images"])
        except (KeyError, TypeError):
            raise BrokenRecord(f"{self.record}: no model.total_images in its config. Restore or remove the file") from None

    @property
    def ended(self) -> bool:
        """Whether training has ended, also before its image budget, for example by early stopping."""
        return self.record.exists() and "images_seen" in read_record(self.record)

    @property
    def evaluated(self) -> bool:
        """Whether the best weights have been evaluated on the test sets."""
        return self.finished and "metrics" in read_record(self.record)


def program_name() -> str:
    """Return the command that starts Darkroom: "darkroom" if it is on the search path."""
    if shutil.which("darkroom"):
        return "darkroom"
    if Path(sys.argv[0]).name == "darkroom":
        return sys.argv[0]
    return f"{Path(sys.executable).name} -m experiments"


def open_run(recipe: Recipe, name: str | None) -> Run:
    """Return the run of that name, or a new one named by the time (under SLURM or torchrun: by the job id).

    Child processes read the folder from the environment variable DARKROOM_RUN_FOLDER.

    Raises:
        UserError: the name is a path, torchrun has no id for the job, or the folder cannot be created.
    """
    folder = os.environ.get("DARKROOM_RUN_FOLDER")
    if folder and os.environ.get("LOCAL_RANK", "0") != "0":
        return Run(Path(folder))
    if not name and "SLURM_PROCID" in os.environ:  # a batch job or a step, not a shell inside an allocation
        name = os.environ["SLURM_JOB_ID"]
    name = name or os.environ.get("TORCHELASTIC_RUN_ID")
    if name and (Path(name).name != name or name == ".."):
        raise UserError(f"--run {name}: must be a name, not a path. DARKROOM_RUNS sets the folder of all runs")
    if name == "none":  # torchrun's default id, which is the same for all jobs
        raise UserError("--run: required under torchrun. Use --run NAME, or torchrun --rdzv-id NAME")
    parent = runs_root() / recipe.name
    run = Run(parent / name if name else _new_folder(parent))
    os.environ["DARKROOM_RUN_FOLDER"] = str(run.folder)
    return run


def _new_folder(parent: Path) -> Path:
    """Create a folder named by the time, so that no other run can use the name."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror}. DARKROOM_RUNS sets the folder of all runs") from None
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in itertools.count():
        folder = parent / (f"{stamp}_{suffix}" if suffix else stamp)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def finished_runs(recipe: Recipe) -> list[Run]:
    """List the runs of a recipe whose training has ended and that still have their best weights, newest first."""
    records = (runs_root() / recipe.name).glob("*/record.json")
    runs = []
    for path in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        run = Run(path.parent)
        try:
            if run.ended and run.best_checkpoint.exists():
                runs.append(run)
        except BrokenRecord as error:
            print(f"skipped: {error}", file=sys.stderr)
    return runs
