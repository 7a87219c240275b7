"""`darkroom fit`: train, or go on training; then measure."""

import ctypes
import gc
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run.checkpoints import load_weights
from callbacks.run.csv_logger import CSVLogger
from datamodules.catalog.catalog import DatasetNotFound
from datamodules.errors import UserError
from experiments.run.evaluate import say_results
from experiments.run.lightning_cli import DarkroomCLI, tell
from experiments.run.run_dir import Run
from experiments.run.weights import read_checkpoint

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def fit(cli: DarkroomCLI) -> None:
    """Train, or go on training; then measure the best weights on the test sets that are here."""
    run, trainer, model = cli.run, cli.trainer, cli.model
    with alone(cli, run):
        if not list(model.parameters()):
            raise UserError(f"{type(model).__name__} has nothing to train: darkroom test {cli.recipe.name} measures it")
        settle_batch(cli)
        measurable = can_be_measured(cli)
        resumed_at, checkpoint = prepare(cli, run, measurable)
        trainer.loggers = loggers(cli, run, resumed_at)
        spare_steps()
        trainer.fit(model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        if measurable:
            trained = model if not model.fsdp_modules else cli.another_model()
            load_weights(trained, run.checkpoints / "best.ckpt")
            trainer.loggers = []
            trainer.test(trained, cli.datamodule, verbose=False)
            say_results(trainer, cli)
    tell(f"run       {run.folder}")


def train_alone(cli: DarkroomCLI, steps: int, watch: Callback) -> None:
    """Train for so many steps, and neither validate nor measure: for a watch that stops how long it takes."""
    cli.model.total_images = cli.datamodule.batch_size * steps
    cli.trainer.limit_val_batches = 0
    cli.trainer.num_sanity_val_steps = 0
    cli.trainer.callbacks.append(watch)
    with alone(cli, cli.run):
        settle_batch(cli)
        cli.trainer.loggers = loggers(cli, cli.run, prepare(cli, cli.run)[0])
        spare_steps()
        cli.trainer.fit(cli.model, cli.datamodule)


@contextmanager
def alone(cli: DarkroomCLI, run: Run) -> Iterator[None]:
    """Make the run's folder and hold it against other commands; the system frees it when this process ends."""
    began = run.config.exists()
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {run.folder}: {error.strerror}") from None
    try:
        if not cli.trainer.is_global_zero:
            yield
            return
        with FileLock(run.folder / ".lock", blocking=False):
            yield
    except Timeout:
        raise UserError(f"run '{run.folder.name}' is being written by another process; another --run starts anew") from None
    except UserError:
        if not began and not cli.trainer.global_step and cli.trainer.is_global_zero:
            shutil.rmtree(run.folder)  # nothing came of it
        raise


def settle_batch(cli: DarkroomCLI) -> None:
    """How each process takes its share of a batch: in how many parts, by networks that are compiled or not.

    Raises:
        Refused: the global batch cannot be cut so.
    """
    parts = cli.config.accumulate_grad_batches
    if parts < 1 or cli.datamodule.batch_size % (parts * cli.trainer.world_size):
        shared = f"{cli.trainer.world_size} processes with --accumulate_grad_batches {parts}"
        raise UserError(f"data.batch_size: {cli.datamodule.batch_size} cannot be cut into equal parts for {shared}")
    cli.model.accumulate_grad_batches = parts
    if cli.config.compile:
        cli.model.compile_networks()


def can_be_measured(cli: DarkroomCLI) -> bool:
    """Whether some test set is here; a damaged or mistyped one is refused now, not when training has ended."""
    if not cli.datamodule.test:
        return False

    try:
        deepcopy(cli.datamodule).setup("test")
    except DatasetNotFound as error:
        tell(f"not measured after training: {error}")
        return False
    return True


def spare_steps() -> None:
    """Spare every step three costs that do not belong to it.

    What is loaded by now leaves the garbage collector's rounds. Where there is no GPU, torch's Adam looks for one at each
    step, and Lightning has it look for a driver's library on the disk, a fifth of a millisecond; from now on it asks CUDA
    itself. And glibc keeps the memory of a step for the next: by itself it returns large blocks to the system and gets them
    back page by page, a tenth of a small network's step on a CPU.
    """
    gc.collect()
    gc.freeze()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    with suppress(OSError, AttributeError):  # another system's C library
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL("libc.so.6").mallopt(option, 2**30)


def prepare(cli: DarkroomCLI, run: Run, measurable: bool = False) -> tuple[int, Path | None]:
    """Find where the run that stands in the folder goes on, and leave the configuration there.

    A run that was trained to its end but not yet measured goes on with its measurement.

    Returns:
        Images seen, and the checkpoint.

    Raises:
        Refused: the run is finished, began otherwise, or there is no room on the disk.
    """
    last = run.checkpoints / "last.ckpt"
    resumed_at, checkpoint = 0, None
    if last.exists():
        found = read_checkpoint(last)
        resumed_at, checkpoint = found["images_seen"], last
        if resumed_at >= cli.model.total_images and (run.measured or (run.finished and not measurable)):
            raise UserError(
                f"run '{run.folder.name}' is finished after {resumed_at} images; a larger --model.total_images goes on with it, "
                "another --run starts anew"
            )
        refuse_another_run(cli, run)
        tell(f"going on with {run.folder} after {resumed_at:,} images")
        for key, now in (("world_size", cli.trainer.world_size), ("precision", str(cli.trainer.precision))):
            if found[key] != now:
                tell(f"{key} {now} instead of {found[key]}: no longer bit for bit the uninterrupted run")
        if run.record.exists() and resumed_at < cli.model.total_images and cli.trainer.is_global_zero:
            run.record.rename(run.folder / f"record-{resumed_at}.json")  # what follows is another result
    write_config(cli, run)
    if (free := shutil.disk_usage(run.folder).free) < 2**28:
        raise UserError(f"only {free // 2**20} MiB are free at {run.folder}; at least 256 are needed")
    return resumed_at, checkpoint


def refuse_another_run(cli: DarkroomCLI, run: Run) -> None:
    """A run goes on with the network and the data it began with; budget and learning rate may change."""
    for part in ("model", "data"):
        for key, old, new in cli.differences(run, part):
            raise UserError(f"run '{run.folder.name}' began with {key} {old}, not {new}; another --run starts anew")
    began = yaml.safe_load(run.config.read_text())
    if began.get("monitor") != cli.config.monitor:
        raise UserError(f"run '{run.folder.name}' began with monitor {began.get('monitor')}, not {cli.config.monitor}")


@rank_zero_only
def write_config(cli: DarkroomCLI, run: Run) -> None:
    """Leave the resolved configuration in the run's folder; `darkroom fit <it>` repeats the run."""
    config = cli.config.clone()
    config.pop("run")
    beside = run.config.with_suffix(".part")
    beside.write_text(cli.parser.dump(config, skip_link_targets=True, skip_validation=True))
    beside.replace(run.config)


def loggers(cli: DarkroomCLI, run: Run, resumed_at: int) -> list[Logger]:
    """The CSV log, and Weights & Biases if asked for."""
    found: list[Logger] = [CSVLogger(run.log, resumed_at)]
    if cli.config.wandb:
        from lightning.pytorch.loggers import WandbLogger

        name = f"{cli.recipe.name}/{run.folder.name}"
        offline = cli.config.wandb == "offline"
        if not offline and not (os.environ.get("WANDB_API_KEY") or Path.home().joinpath(".netrc").exists()):
            raise UserError("--wandb online needs an account: run `wandb login` first, or take --wandb offline")
        # A run that goes on keeps its name there; one that W&B's agent has started has a name from it.
        identity = None if "WANDB_SWEEP_ID" in os.environ else re.sub(r"\W", "-", name)
        found.append(WandbLogger(name, run.folder, id=identity, project="darkroom", offline=offline, resume="allow"))
    return found
