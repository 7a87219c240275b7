"""LightningCLI with the project's defaults: builds model, datamodule and Trainer from a recipe and overrides."""

import logging
import shlex
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import lightning as L
import torch
import yaml
from jsonargparse.typing import ClosedUnitInterval
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pydantic import PositiveFloat, PositiveInt

from callbacks.run.checkpoints import Checkpoints, LocalCheckpointIO
from callbacks.run.data_report import PrintDataReport
from callbacks.run.image_table import ImageTable
from callbacks.run.preemption import Preemption
from callbacks.run.progress import ProgressBar
from callbacks.run.run_record import RunRecord
from callbacks.visualization.previews import PreviewImages
from datamodules.errors import UserError, escape_controls
from experiments.cli.errors import format_cli_error, parameters
from experiments.cli.help import key_help
from experiments.results import records
from experiments.run.config_checks import (
    MANAGED_OPTIONS,
    UNSUPPORTED_SETTINGS,
    check_batch_sizes,
    check_data,
    check_finite,
    check_recipe,
    check_sources,
    check_trainer,
    list_of_one,
    option_value,
    typed_keys,
)
from experiments.run.cpu import configure_cpu
from experiments.run.gpu import check_gpu, configure_tf32
from experiments.run.recipes import Recipe, import_class
from experiments.run.run_dir import Run, open_run, program_name
from modules.training.ddp import ManualDDPStrategy
from modules.training.lightning_compat import NoProfiler
from modules.training.method import Method

# Options of `fit` in the configuration of a run, which other commands accept without using them.
FIT_OPTIONS = {
    "accumulate_grad_batches": int | None,
    "compile": bool | None,
    "tf32": bool | None,
    "wandb": str | None,
    "log": Any,
}
# Keys of model and data that may change when a run is resumed.
RESUMABLE_KEYS = {"total_images", "learning_rate", "warmup", "num_workers", "test", "skip_bad"}


class DarkroomCLI(LightningCLI):
    """LightningCLI with the project's defaults, for one command and one recipe.

    Args:
        command: "fit", "validate", "test" or "predict".
        recipe: the recipe to run.
        overrides: command line arguments after the recipe.
    """

    def __init__(self, command: str, recipe: Recipe, overrides: list[str]) -> None:
        self.command, self.recipe, self.overrides = command, recipe, overrides
        self.trainer: Any
        super().__init__(
            Method,
            L.LightningDataModule,
            args=["--config", recipe.config, *list_of_one(overrides)],
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "max_epochs": -1,
                "enable_checkpointing": False,
                "enable_model_summary": False,
                "enable_progress_bar": False,
                "use_distributed_sampler": False,  # datamodules distribute the samples over ranks
            },
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "usage": f"darkroom {command} {recipe.name} [--KEY VALUE ...]",
            },
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments.

        Raises:
            UserError: a key or a value is invalid; the message contains the closest valid one.
            SystemExit: the help text was printed.
        """
        given = (arg.partition("=")[0] for arg in self.overrides)
        if option := next((name for name in given if name in MANAGED_OPTIONS), None):
            raise UserError(f"{option}: set by Darkroom. Use {MANAGED_OPTIONS[option]}")
        check_recipe(self.recipe)
        if (seed := option_value(self.overrides, "--seed_everything")) and seed.lower() in ("true", "false"):
            raise UserError(f"seed_everything: {seed} is not a number. Choose a seed, such as 0")
        if {"-h", "--help"} & {*self.overrides}:
            refused = {*MANAGED_OPTIONS, *(f"--trainer.{name}" for name in UNSUPPORTED_SETTINGS)}
            for action in parser._actions:
                if refused & {*action.option_strings}:
                    action.help = SUPPRESS
            print(key_help(parser.format_help(), self.recipe))
            raise SystemExit
        try:
            super().parse_arguments(parser, args)
        except jsonargparse.ArgumentError as error:
            options = [option.lstrip("-") for option in parser._option_string_actions]
            for section in ("model", "data"):
                options += [f"{section}.{name}" for name in parameters(self.recipe.class_path(section))]
            raise UserError(format_cli_error(str(error), options)) from None
        except yaml.YAMLError as error:
            raise UserError(" ".join(str(error).split())) from None

        seed = self.config.seed_everything
        if not 0 <= seed < 2**32:
            raise UserError(f"seed_everything: {seed} is not between 0 and {2**32 - 1}. Choose a seed in this range")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the project's options."""
        parser.add_argument("--monitor", type=str | None, help="logged metric that selects the best weights")
        parser.add_argument(
            "--monitor_mode", type=Literal["max", "min"], default="max", help="whether higher or lower values of it are better"
        )
        parser.add_argument(
            "--val_every_images", type=PositiveInt, default=100_000, help="training images between two validations"
        )
        if self.command == "fit":
            parser.add_argument("--run", type=str | None, help="name of the run; an existing run is resumed")
            parser.add_argument(
                "--accumulate_grad_batches", type=PositiveInt, default=1, help="micro-batches per optimizer step on each device"
            )
            parser.add_argument("--compile", type=bool, default=False, help="compile the networks with torch.compile")
            parser.add_argument(
                "--tf32", type=bool, default=False, help="compute float32 on GPUs since Ampere in TF32, which has ten bits"
            )
            parser.add_argument(
                "--log",
                nargs="+",
                choices=["csv", "tensorboard", "wandb"],
                default=["csv"],
                help="logs, with preview images: metrics.csv (always), TensorBoard, Weights & Biases",
            )
            parser.add_argument(
                "--wandb", type=Literal["online", "offline"] | None, help="log to Weights & Biases (default online with --log)"
            )
        else:
            for name, kind in FIT_OPTIONS.items():  # a run's configuration contains them
                parser.add_argument(f"--{name}", type=kind, help=SUPPRESS)
            parser.add_argument("--ckpt", type=str | None, help="weights to use: a .ckpt, .safetensors or .pth file")
        if self.command == "test":
            parser.add_argument("--record", type=str | None, help="path of the run record to write")
        if self.command == "predict":
            parser.add_argument("--input", nargs="+", type=str, required=True, help="images, folders of images, or one video")
            parser.add_argument("--output", type=str, default="out", help="output folder")
            parser.add_argument(
                "--direction", type=Literal["AtoB", "BtoA"] | None, help="direction of a translation (default AtoB)"
            )
            parser.add_argument(
                "--style", type=str | None, help="style of a style transfer, or weights: wave=0.7,the_scream=0.3"
            )
            parser.add_argument(
                "--alpha", type=ClosedUnitInterval | None, help="weight of the stylized image in the output, 0 to 1 (default 1)"
            )
            parser.add_argument(
                "--temperature", type=PositiveFloat | None, help="temperature of a colorization (default that of the recipe)"
            )
            parser.add_argument("--score", type=ClosedUnitInterval | None, help="lowest score of a detection (default 0.5)")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        if "seed" in parameters(self.recipe.class_path("model")):
            parser.link_arguments("seed_everything", "model.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Set the keys that model and data have in common, check values, and convert the validation interval to batches.

        Raises:
            UserError: two keys contradict each other, or a value is invalid.
        """
        model, data = (self.config[section].get("init_args", jsonargparse.Namespace()) for section in ("model", "data"))
        typed = typed_keys(self.overrides)
        for key in sorted(set(vars(model)) & set(vars(data))):  # numbers of channels or classes, sizes, scales
            for section, values in (("model", model), ("data", data)):
                if isinstance(values[key], int) and values[key] < 0:
                    raise UserError(f"{section}.{key}: {values[key]} must not be negative")
            if model[key] != data[key]:
                if (f"model.{key}" in typed) == (f"data.{key}" in typed):
                    advice = "Set both to the same value"
                    raise UserError(f"model.{key}: {model[key]} differs from data.{key}: {data[key]}. {advice}")
                source, target = (model, data) if f"model.{key}" in typed else (data, model)
                target[key] = source[key]  # an option for one of them sets both
        check_data(data)
        check_trainer(vars(self.config.trainer))
        check_finite(self.config.as_dict())
        if data.get("val_every_nth") and data.get("val"):
            raise UserError(
                "data.val and data.val_every_nth both select validation images. Use --data.val_every_nth 0 or --data.val null"
            )
        self.config.trainer.val_check_interval = max(1, self.config.val_every_images // data.batch_size)
        self.config.trainer.check_val_every_n_epoch = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Create the Trainer with the callbacks of the command; for `fit`, open the run first."""
        self.trainer_defaults["callbacks"] = [PrintDataReport(), ProgressBar(self.config.monitor)]
        if self.command == "test" and self.config.record:
            record = Path(self.config.record)
            self.trainer_defaults["callbacks"] += [RunRecord(record, self.metadata()), ImageTable(record.with_suffix(".csv"))]
        if self.command != "fit":
            return self.make_trainer()
        self.run = open_run(self.recipe, self.config.run)
        self.trainer_defaults["callbacks"] += [
            PreviewImages(self.run.samples),
            RunRecord(self.run.record, self.metadata()),
            ImageTable(self.run.image_table),
            Checkpoints(self.run.checkpoints, self.config.monitor, self.config.monitor_mode),
            Preemption(self.run.checkpoints / "last.ckpt", f"Resume with: {self.resume_command()}"),
        ]
        profiler = self.config_init.trainer.profiler or NoProfiler()
        return self.make_trainer(default_root_dir=str(self.run.folder), profiler=profiler)

    def make_trainer(self, **settings: Any) -> L.Trainer:
        """Create the Trainer.

        Raises:
            UserError: a setting is invalid, the strategy does not let `modules/training/gradients.py` average gradients, or the
                GPU of the machine cannot be used.
        """
        if str(self.config.trainer.strategy) in ("fsdp", "fsdp_cpu_offload"):
            raise UserError("trainer.strategy: fsdp cannot train alternating networks. Use 'ddp', or 'fsdp2' to shard them")
        if SLURMEnvironment.detect():  # Lightning would save within a step; callbacks/run/preemption.py saves after it
            settings["plugins"] = SLURMEnvironment(auto_requeue=False)
        try:
            trainer = super().instantiate_trainer(logger=False, **settings)
        except (ValueError, TypeError, MisconfigurationException) as error:  # incompatible settings
            raise UserError(" ".join(str(error).split())) from None
        trainer.strategy.checkpoint_io = LocalCheckpointIO()
        configure_tf32(self.command == "fit" and self.config.tf32)
        if str(self.config.trainer.accelerator) == "auto" and trainer.strategy.root_device.type == "cpu":
            check_gpu()
        if str(trainer.precision) == "16-true" and trainer.strategy.root_device.type == "cpu":
            raise UserError(f"trainer.precision: {trainer.precision} requires a GPU. Use bf16-mixed or 32-true on a CPU")
        if self.config.trainer.sync_batchnorm and trainer.strategy.root_device.type == "cpu":
            raise UserError("trainer.sync_batchnorm: torch synchronizes batch normalization on GPUs only. Set it to false")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | ManualDDPStrategy):
            raise UserError(f"trainer.strategy: {type(trainer.strategy).__name__} is not supported. Use 'ddp' or 'fsdp2'")
        return trainer

    def fresh_model(self) -> Method:
        """Return a new unsharded model with its initial weights."""
        return self.parser.instantiate_classes(self.config.clone())["model"]

    def metadata(self) -> dict[str, Any]:
        """Return the entries of the run record that are known before the run."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False))
        for key in ("record", "ckpt"):  # paths that do not affect the result
            config.pop(key, None)
        overrides = drop_option(drop_option(self.overrides, "--record"), "--ckpt")
        return {**records.metadata(self.recipe, overrides), "seed": self.config.seed_everything, "config": config}

    def config_diff(self, run: Run, section: str, ignored: Set[str] = RESUMABLE_KEYS) -> list[tuple[str, Any, Any]]:
        """List the keys of "model" or "data" that differ from the configuration of a run: (key, old value, new value)."""
        run_config = run.read_config()
        config = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=True))
        old, new = ({"class_path": c[section]["class_path"], **c[section]["init_args"]} for c in (run_config, config))
        keys = sorted((old.keys() | new.keys()) - ignored)
        return [(f"{section}.{key}", old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]

    def resume_command(self) -> str:
        """Return the command that resumes this run."""
        overrides = drop_option(self.overrides, "--run")
        return f"{program_name()} " + shlex.join(["fit", self.recipe.argument, *overrides, "--run", self.run.folder.name])


class ParseOnlyCLI(DarkroomCLI):
    """A command line that is parsed and checked without instantiating any class."""

    def instantiate_classes(self) -> None:
        """Do nothing."""


def validate_overrides(recipe: Recipe, *trials: list[str], processes: int = 1, elsewhere: bool = False) -> None:
    """Check the overrides of trainings that run later, such as on a cluster, and print remarks on them.

    Args:
        recipe: the recipe.
        trials: words of the command line of each training after the recipe.
        processes: number of processes of a training.
        elsewhere: whether the trainings run on another machine, see `check_sources`.

    Raises:
        UserError: a key or a value is invalid, a folder does not exist, or a batch cannot be divided between the processes.
    """
    silence_lightning()
    notes: list[str] = []
    for overrides in trials:
        try:
            config = ParseOnlyCLI("fit", recipe, overrides).config
            with torch.device("meta"):
                method = import_class(config.model.class_path)(**config.model.init_args.as_dict())
            batch_size, accumulate = config.data.init_args.batch_size, config.accumulate_grad_batches
            check_batch_sizes(method, batch_size, accumulate, processes)
            absent = check_sources(config.data.init_args, elsewhere)
        except UserError as error:
            raise UserError(f"{error} (in {shlex.join(overrides)})" if len(trials) > 1 else str(error)) from None
        if absent:
            notes.append(f"not on this machine: {', '.join(absent)}")
        if processes > 1 and batch_size == processes * accumulate:
            notes.append(f"each of {processes} processes has one sample per step. A larger data.batch_size is faster")
    for note in dict.fromkeys(notes):
        print(f"note      {note}", file=sys.stderr)


def drop_option(argv: list[str], option: str) -> list[str]:
    """Return the arguments without an option and its value."""
    remaining = [arg for arg in argv if not arg.startswith(f"{option}=")]
    if option in remaining:
        index = remaining.index(option)
        del remaining[index : index + 2]
    return remaining


def build_cli(command: str, recipe: Recipe, overrides: list[str]) -> DarkroomCLI:
    """Build the model, datamodule and Trainer of a command.

    Raises:
        UserError: the recipe or an override is invalid.
    """
    configure_cpu()
    silence_lightning()
    try:
        return DarkroomCLI(command, recipe, overrides)
    except ValueError as error:
        if isinstance(error.__cause__, UserError):  # raised by a constructor, wrapped by jsonargparse
            raise error.__cause__ from None
        raise


@rank_zero_only
def print_rank_zero(line: str) -> None:
    """Print a line on rank 0 only."""
    print(escape_controls(line), flush=True)


def silence_lightning() -> None:
    """Silence Lightning's messages about intended behavior."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "LightningCLI's args parameter",
        "The '.*_dataloader' does not have many workers",
        "You're resuming from a checkpoint that ended before the epoch ended",
        "isinstance.treespec, LeafSpec.",
        "``instantiate_classes`` was deprecated",
        "Couldn't infer the batch indices",
        "The `srun` command is available on your system but is not used",  # on a login node, or in a batch script outside srun
        r"Found \d+ module\(s\) in eval mode",  # frozen networks keep their statistics of batch normalization
        "It is recommended to use `self.log",  # metrics are gathered from all ranks before they are logged
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
