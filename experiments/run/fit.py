"""`darkroom fit`: train or resume training, then evaluate."""

import gc
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run.csv_logger import CSVLogger
from datamodules.catalog.catalog import DatasetNotFound
from datamodules.errors import UserError
from experiments.results.fingerprint import user_files
from experiments.run.evaluate import print_results
from experiments.run.lightning_cli import DarkroomCLI, print_rank_zero
from experiments.run.run_dir import Run
from modules.networks.weights import load_weights, read_checkpoint
from modules.training.stages import StagePlan


def fit(cli: DarkroomCLI) -> None:
    """Train or resume training, then evaluate the best weights on the available test sets.

    Raises:
        UserError: the method has nothing to train, or the run cannot be started or resumed.
    """
    run, trainer, model = cli.run, cli.trainer, cli.model
    with locked_run(cli, run):
        if not list(model.parameters()):
            raise UserError(
                f"{type(model).__name__} has nothing to train. Evaluate it with darkroom test {cli.recipe.argument}"
            )
        configure_batching(cli)
        evaluates = has_test_data(cli)
        resumed_at, checkpoint = prepare_resume(cli, run, evaluates)
        trainer.loggers = make_loggers(cli, run, resumed_at)
        reduce_step_overhead()
        trainer.fit(model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        if evaluates:
            best_model = model if not model.fsdp_modules else cli.fresh_model()
            load_weights(best_model, run.best_checkpoint)
            trainer.loggers = []
            trainer.test(best_model, cli.datamodule, verbose=False)
            print_results(trainer, cli)
    print_rank_zero(f"run       {run.folder}")


def skip_to_last_stage(cli: DarkroomCLI) -> None:
    """Let the training start at its last stage, with the images seen before it."""
    cli.model.images_seen = cli.model.plan_stages(cli.datamodule).starts[-1]


def train_without_eval(cli: DarkroomCLI, steps: int, timer: Callback) -> None:
    """Train for a number of steps without validation and evaluation, with a callback; call `skip_to_last_stage` before."""
    cli.model.total_images = cli.model.images_seen + cli.model.stage_plan.batch_sizes[-1] * steps
    cli.trainer.limit_val_batches = 0
    cli.trainer.num_sanity_val_steps = 0
    cli.trainer.callbacks.append(timer)
    with locked_run(cli, cli.run):
        configure_batching(cli)
        cli.trainer.loggers = make_loggers(cli, cli.run, prepare_resume(cli, cli.run)[0])
        reduce_step_overhead()
        cli.trainer.fit(cli.model, cli.datamodule)


@contextmanager
def locked_run(cli: DarkroomCLI, run: Run) -> Iterator[None]:
    """Create the run's folder and lock it against other processes.

    Raises:
        UserError: the folder cannot be created, or another process holds the lock.
    """
    existed = run.folder.exists() and any(run.folder.iterdir())
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {run.folder}: {error.strerror}. DARKROOM_RUNS sets the folder of all runs") from None
    try:
        if not cli.trainer.is_global_zero:
            yield
            return
        with FileLock(run.folder / ".lock", blocking=False):
            yield
    except Timeout:
        raise UserError(f"run '{run.folder.name}' is in use by another process. Choose another --run") from None
    except UserError:
        if not existed and not cli.trainer.global_step and cli.trainer.is_global_zero:
            shutil.rmtree(run.folder)  # remove the folder of a run that did not start
        raise


def configure_batching(cli: DarkroomCLI) -> None:
    """Set the number of gradient accumulation steps, and compile the networks if requested.

    Raises:
        UserError: the global batch cannot be divided into equal micro-batches.
    """
    accumulate = cli.config.accumulate_grad_batches
    for batch_size in StagePlan(cli.model.stages(), cli.datamodule.batch_size).batch_sizes:
        if accumulate < 1 or batch_size % (accumulate * cli.trainer.world_size):
            divisor = f"{cli.trainer.world_size} processes x --accumulate_grad_batches {accumulate}"
            name = "data.batch_size" if batch_size == cli.datamodule.batch_size else "model.batch_sizes or data.batch_size"
            raise UserError(f"{name}: {batch_size} is not divisible by {divisor}. Use a multiple of the product")
    cli.model.accumulate_grad_batches = accumulate
    if cli.config.compile:
        cli.model.compile_networks()


def has_test_data(cli: DarkroomCLI) -> bool:
    """Return whether a test set is available. A damaged or misspelled test set raises an error before training."""
    if not cli.datamodule.test:
        return False

    try:
        deepcopy(cli.datamodule).setup("test")
    except DatasetNotFound as error:
        print_rank_zero(f"not evaluated after training: {error}")
        return False
    return True


def reduce_step_overhead() -> None:
    """Remove two per-step overheads.

    Existing objects are excluded from garbage collection. Without a GPU, torch's Adam checks for one at each step. With
    Lightning's settings, this check searches the disk for a driver library (0.2 ms); the environment variable selects a query
    of CUDA instead.
    """
    gc.collect()
    gc.freeze()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


def prepare_resume(cli: DarkroomCLI, run: Run, evaluates: bool = False) -> tuple[int, Path | None]:
    """Find the checkpoint from which the run resumes, and write the configuration into its folder.

    A run that is trained but not yet evaluated resumes with its evaluation.

    Returns:
        Images seen at the checkpoint, and the checkpoint; 0 and None for a new run.

    Raises:
        UserError: the run is finished, was started with another configuration, has lost its last checkpoint, or the disk is
            full.
    """
    last = run.checkpoints / "last.ckpt"
    resumed_at, checkpoint = 0, None
    if run.record.exists() and not last.exists():  # a new run would replace the results
        raise UserError(
            f"run '{run.folder.name}' has a record, but not {last}, so it cannot be resumed. "
            "Restore that file, or choose another --run"
        )
    if last.exists():
        content = read_checkpoint(last)
        resumed_at, checkpoint = content["images_seen"], last
        if resumed_at >= cli.model.total_images and (run.evaluated or (run.finished and not evaluates)):
            raise UserError(
                f"run '{run.folder.name}' is finished after {resumed_at} images. "
                "Continue it with a larger --model.total_images, or choose another --run"
            )
        check_same_config(cli, run)
        print_rank_zero(f"resuming {run.folder} after {resumed_at:,} images")
        for key, value in (("world_size", cli.trainer.world_size), ("precision", str(cli.trainer.precision))):
            if content[key] != value:
                print_rank_zero(f"{key} {value} instead of {content[key]}: not bit-identical to an uninterrupted run")
        if run.record.exists() and resumed_at < cli.model.total_images and cli.trainer.is_global_zero:
            run.record.rename(run.folder / f"record-{resumed_at}.json")  # the longer run gets a new record
    write_config(cli, run)
    if (free := shutil.disk_usage(run.folder).free) < 2**28:
        raise UserError(f"{run.folder}: only {free // 2**20} MiB free. Free 256 MiB, or set DARKROOM_RUNS to another disk")
    return resumed_at, checkpoint


def check_same_config(cli: DarkroomCLI, run: Run) -> None:
    """Check that the run was started with the same model, data and monitor; RESUMABLE_KEYS may differ.

    Raises:
        UserError: a key differs.
    """
    for section in ("model", "data"):
        for key, old, new in cli.config_diff(run, section):
            raise UserError(f"run '{run.folder.name}' was started with {key} {old}, not {new}. Choose another --run")
    started = run.read_config()
    if started.get("monitor") != cli.config.monitor:
        raise UserError(
            f"run '{run.folder.name}' was started with monitor {started.get('monitor')}, not {cli.config.monitor}. "
            "Choose another --run"
        )


@rank_zero_only
def write_config(cli: DarkroomCLI, run: Run) -> None:
    """Write the resolved configuration into the run's folder; `darkroom fit` with this file repeats the run."""
    config = cli.config.clone()
    config.pop("run")
    tmp_path = run.config.with_suffix(".part")
    tmp_path.write_text(cli.parser.dump(config, skip_none=False, skip_link_targets=True, skip_validation=True))
    tmp_path.replace(run.config)
    for file in user_files(cli.recipe):  # the run can be used without them
        run.code.mkdir(exist_ok=True)
        shutil.copy(file, run.code)


def make_loggers(cli: DarkroomCLI, run: Run, resumed_at: int) -> list[Logger]:
    """Create the CSV logger, and with --wandb the Weights & Biases logger.

    Raises:
        UserError: --wandb is "online" without an account.
    """
    loggers: list[Logger] = [CSVLogger(run.log, resumed_at)]
    if cli.config.wandb:
        from lightning.pytorch.loggers import WandbLogger

        name = f"{cli.recipe.name}/{run.folder.name}"
        offline = cli.config.wandb == "offline"
        if not offline and not (os.environ.get("WANDB_API_KEY") or Path.home().joinpath(".netrc").exists()):
            raise UserError("--wandb online: no account. Run `wandb login` first, or use --wandb offline")
        # A fixed id lets a resumed run continue its W&B run; a W&B agent sets the id.
        run_id = None if "WANDB_SWEEP_ID" in os.environ else re.sub(r"\W", "-", name)
        loggers.append(WandbLogger(name, run.folder, id=run_id, project="darkroom", offline=offline, resume="allow"))
    return loggers
