"""`darkroom fit`: train or resume training, then evaluate."""

import gc
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run.checkpoints import Checkpoints
from callbacks.run.csv_logger import CSVLogger
from callbacks.run.data_report import PrintDataReport
from datamodules.catalog.catalog import DatasetNotFound
from datamodules.errors import UserError
from datamodules.reconstruction import Reconstruction
from experiments.results.fingerprint import user_files
from experiments.run.config_checks import check_batch_sizes
from experiments.run.evaluate import print_results
from experiments.run.lightning_cli import DarkroomCLI, print_rank_zero
from experiments.run.lock import RunInUse, locked
from experiments.run.resume import await_checkpoint, prepare_resume, set_aside_record
from experiments.run.run_dir import Run, program_name
from experiments.tasks.registry import TASKS
from modules.networks.weights import load_weights
from modules.tasks.generation import GenerativeMethod


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
        await_checkpoint(cli, run)
        resumed_at, checkpoint = prepare_resume(cli, run, evaluates)
        next(c for c in trainer.callbacks if isinstance(c, Checkpoints)).resumed_at = resumed_at
        trainer.loggers = make_loggers(cli, run, resumed_at)
        set_aside_record(cli, run, resumed_at)
        write_config(cli, run)
        print_start(cli)
        reduce_step_overhead()
        trainer.fit(model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        print_early_end(cli)
        if evaluates:
            best_model = model if not model.fsdp_modules else cli.fresh_model()
            best_model.images_seen = model.images_seen  # on which the stage of a network can depend
            load_weights(best_model, run.best_checkpoint)
            trainer.loggers = [logger for logger in trainer.loggers if not isinstance(logger, CSVLogger)]
            trainer.test(best_model, cli.datamodule, verbose=False)
            print_results(trainer, cli)
    print_end(cli, run)


def print_start(cli: DarkroomCLI) -> None:
    """Print the network, the devices, and the time that the recipe states."""
    trainer, model = cli.trainer, cli.model
    count = sum(parameter.numel() for parameter in model.parameters())
    device = trainer.strategy.root_device.type
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device.upper()}, {torch.get_num_threads()} threads"
    processes = f"{trainer.world_size} processes on " if trainer.world_size > 1 else ""
    print_rank_zero(f"network   {type(model).__name__}, {count:,} parameters; {processes}{name}, {trainer.precision}")
    times = [line.removeprefix("Time: ") for line in cli.recipe.header if line.startswith("Time: ")]
    budget = f"{model.total_images:,} images" + (f"; the recipe took {times[0]}" if times and not cli.overrides else "")
    print_rank_zero(f"training  {budget}")
    for callback in trainer.callbacks:
        if isinstance(callback, PrintDataReport):
            callback.counts = True


def print_early_end(cli: DarkroomCLI) -> None:
    """Print what has ended the training before its image budget, and how it goes on."""
    model, settings = cli.model, cli.config.trainer
    if model.images_seen < model.total_images:
        limits = [name for name in ("max_time", "max_steps") if settings[name] not in (None, -1)]
        cause = " or ".join(f"trainer.{name}" for name in limits) or "a callback"
        print_rank_zero(f"ended     by {cause} after {model.images_seen:,} of {model.total_images:,} images")
        if limits:
            print_rank_zero(f"          Increase {cause} to continue: {cli.resume_command()}")


def print_end(cli: DarkroomCLI, run: Run) -> None:
    """Print where the results are, and the command that uses the network."""
    print_rank_zero(f"run       {run.folder}")
    if run.samples.is_dir():
        print_rank_zero(f"pictures  {run.samples}")
    if run.image_table.exists():
        print_rank_zero(f"by image  {run.image_table}")
    words = ["reconstruct", str(run.folder)] if isinstance(cli.datamodule, Reconstruction) else []
    words = ["sample", str(run.folder)] if isinstance(cli.model, GenerativeMethod) else words
    if any(task.predict and isinstance(cli.datamodule, task.datamodule) for task in TASKS):
        words = ["predict", str(run.folder), "--input", "FOLDER"]
    if words:
        print_rank_zero(f"next      {program_name()} {shlex.join(words)}")


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
    existed = run.folder.is_dir() and any(run.folder.iterdir())
    run.check_writable()
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {run.folder}: {error.strerror}. DARKROOM_RUNS sets the folder of all runs") from None
    try:
        if not cli.trainer.is_global_zero:
            yield
            return
        with locked(run.folder):
            yield
    except RunInUse:
        raise
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
    check_batch_sizes(cli.model, cli.datamodule.batch_size, accumulate, cli.trainer.world_size)
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
    """Create the CSV logger, and those of --log: TensorBoard, and Weights & Biases with the configuration of the run.

    Raises:
        UserError: Weights & Biases is "online" without an account.
    """
    loggers: list[Logger] = []
    config = {key: value for key, value in cli.config.as_dict().items() if key in ("model", "data", "trainer", "monitor")}
    if "tensorboard" in cli.config.log:
        from callbacks.run.tensorboard_logger import TensorBoardLogger

        loggers.append(TensorBoardLogger(run.folder, {key: config[key] for key in ("model", "data")}))
    if cli.config.wandb or "wandb" in cli.config.log:
        from lightning.pytorch.loggers import WandbLogger

        name = f"{cli.recipe.name}/{run.folder.name}"
        offline = cli.config.wandb == "offline"
        if not offline and not (os.environ.get("WANDB_API_KEY") or Path.home().joinpath(".netrc").exists()):
            raise UserError("--wandb online: no account. Run `wandb login` first, or use --wandb offline")
        # A fixed id lets a resumed run continue its W&B run; a W&B agent sets the id.
        run_id = None if "WANDB_SWEEP_ID" in os.environ else re.sub(r"\W", "-", name)
        loggers.append(
            WandbLogger(name, run.folder, id=run_id, project="darkroom", offline=offline, resume="allow", config=config)
        )
    return [CSVLogger(run.log, resumed_at), *loggers]
