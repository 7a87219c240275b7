"""LightningCLI with the house's defaults: a recipe and overrides become a model, its data and a Trainer."""

import logging
import shlex
import warnings
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import lightning as L
import torch
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pydantic import PositiveInt

from callbacks.run.checkpoints import Checkpoints
from callbacks.run.data_report import PrintDataReport
from callbacks.run.preemption import Preemption
from callbacks.run.progress import ProgressBar
from callbacks.run.run_record import RunRecord
from callbacks.visualization.previews import PreviewImages
from datamodules.errors import UserError
from experiments.cli.errors import explain, parameters
from experiments.cli.help import key_help
from experiments.results import records
from experiments.run.recipes import Recipe
from experiments.run.run_dir import Run, open_run, own_name
from modules.training.ddp import ManualDDPStrategy
from modules.training.lightning_compat import NoProfiler
from modules.training.method import Method

# What Darkroom sets itself, and the option that says it.
INSTEAD = {
    "--trainer.val_check_interval": "--val_every_images",
    "--trainer.check_val_every_n_epoch": "--val_every_images",
    "--trainer.logger": "--wandb for another log beside metrics.csv",
    "--trainer.default_root_dir": "--run, and DARKROOM_RUNS for the folder of all runs",
    "--data.seed": "--seed_everything",
    "--data.init_args.seed": "--seed_everything",
    "--model.seed": "--seed_everything",
    "--model.init_args.seed": "--seed_everything",
    "--trainer.accumulate_grad_batches": "--accumulate_grad_batches",
    "--trainer.gradient_clip_val": "a phase's clip, in the method's file",
}
RESUMABLE_KEYS = {
    "total_images",
    "learning_rate",
    "warmup",
    "num_workers",
    "test",
    "skip_bad",
}  # what a run that goes on may change


class DarkroomCLI(LightningCLI):
    """LightningCLI with the house's defaults; built for one command and one recipe.

    Args:
        command: "fit", "validate", "test" or "predict".
        recipe: what to run.
        overrides: the rest of the command line.
    """

    def __init__(self, command: str, recipe: Recipe, overrides: list[str]) -> None:
        self.command, self.recipe, self.overrides = command, recipe, overrides
        self.trainer: Any
        super().__init__(
            Method,
            L.LightningDataModule,
            args=["--config", str(recipe.path), *overrides],
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
                "use_distributed_sampler": False,  # our samplers neither repeat nor shuffle
            },
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "usage": f"darkroom {command} {recipe.name} [--KEY VALUE ...]",
            },
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Answer a mistyped key or value with the nearest valid one."""
        typed = (word.partition("=")[0] for word in self.overrides)
        if option := next((word for word in typed if word in INSTEAD), None):
            raise UserError(f"{option} is set by Darkroom; take {INSTEAD[option]}")
        if {"-h", "--help"} & {*self.overrides}:
            print(key_help(parser.format_help(), self.recipe))
            raise SystemExit
        try:
            super().parse_arguments(parser, args)
        except jsonargparse.ArgumentError as error:
            options = [option.lstrip("-") for option in parser._option_string_actions]
            for group in ("model", "data"):
                options += [f"{group}.{name}" for name in parameters(self.recipe.class_path(group))]
            raise UserError(explain(str(error), options)) from None
        except yaml.YAMLError as error:
            raise UserError(" ".join(str(error).split())) from None

        seed = self.config.seed_everything
        if not 0 <= seed < 2**32:
            raise UserError(f"seed_everything: {seed} is not between 0 and {2**32 - 1}")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The house's own options."""
        parser.add_argument("--monitor", type=str | None, help="logged figure that chooses the best weights")
        parser.add_argument("--val_every_images", type=PositiveInt, default=100_000, help="images between two validations")
        if self.command == "fit":
            parser.add_argument("--run", type=str | None, help="name of the run; goes on with it if it exists")
            parser.add_argument(
                "--accumulate_grad_batches", type=int, default=1, help="parts in which a process takes its share of a batch"
            )
            parser.add_argument("--compile", type=bool, default=False, help="let torch compile the networks")
            parser.add_argument("--wandb", type=Literal["online", "offline"] | None, help="log to Weights & Biases as well")
        else:
            parser.add_argument("--ckpt", type=str | None, help="weights to use: a .ckpt or .safetensors file")
        if self.command == "test":
            parser.add_argument("--record", type=str | None, help="file to write the run record to")
        if self.command == "predict":
            parser.add_argument("--input", type=str, required=True, help="a picture, or a folder of pictures")
            parser.add_argument("--output", type=str, default="out", help="folder for the results")
            parser.add_argument("--direction", type=Literal["AtoB", "BtoA"] | None, help="of a translation (default AtoB)")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        if "seed" in parameters(self.recipe.class_path("model")):
            parser.link_arguments("seed_everything", "model.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Refuse keys of model and data that contradict each other; count validations in images."""
        model, data = (self.config[part].init_args for part in ("model", "data"))
        for key in sorted(set(vars(model)) & set(vars(data))):
            if model[key] != data[key]:
                raise UserError(f"model.{key} is {model[key]}, but data.{key} is {data[key]}")
        if data.batch_size < 1:
            raise UserError(f"data.batch_size: {data.batch_size} is not a batch")
        if data.num_workers < 0:
            raise UserError(f"data.num_workers: {data.num_workers} is not a number of processes")
        if data.get("val_every_nth") and data.get("val"):
            raise UserError(
                "data.val and data.val_every_nth both name what chooses the checkpoint; take --data.val_every_nth 0 or --data.val null"
            )
        self.config.trainer.val_check_interval = max(1, self.config.val_every_images // data.batch_size)
        self.config.trainer.check_val_every_n_epoch = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer, with the run's callbacks and loggers."""
        self.trainer_defaults["callbacks"] = [PrintDataReport(), ProgressBar(self.config.monitor)]
        if self.command == "test" and self.config.record:
            self.trainer_defaults["callbacks"].append(RunRecord(Path(self.config.record), self.metadata()))
        if self.command != "fit":
            return self.checked_trainer()
        self.run = open_run(self.recipe, self.config.run)
        self.trainer_defaults["callbacks"] += [
            PreviewImages(self.run.samples),
            RunRecord(self.run.record, self.metadata()),
            Checkpoints(self.run.checkpoints, self.config.monitor),
            Preemption(self.run.checkpoints / "last.ckpt", f"Go on with: {self.again()}"),
        ]
        profiler = self.config_init.trainer.profiler or NoProfiler()
        return self.checked_trainer(default_root_dir=str(self.run.folder), profiler=profiler)

    def checked_trainer(self, **settings: Any) -> L.Trainer:
        """The Trainer, unless its gradients would not be averaged as `modules/training/gradients.py` does it."""
        if str(self.config.trainer.strategy) in ("fsdp", "fsdp_cpu_offload"):
            raise UserError(
                "trainer.strategy: fsdp cannot train networks that alternate; take 'ddp', or 'fsdp2' to divide them"
            )
        if SLURMEnvironment.detect():  # which would save in the middle of a step; callbacks/run/preemption.py sees to it
            settings["plugins"] = SLURMEnvironment(auto_requeue=False)
        try:
            trainer = super().instantiate_trainer(logger=False, **settings)
        except (ValueError, TypeError, MisconfigurationException) as error:  # settings that do not go together
            raise UserError(" ".join(str(error).split())) from None
        if not isinstance(trainer.strategy, SingleDeviceStrategy | ManualDDPStrategy):
            raise UserError(f"trainer.strategy: {type(trainer.strategy).__name__} is not supported; take 'ddp' or 'fsdp2'")
        return trainer

    def another_model(self) -> Method:
        """The model as it was before training, in whole."""
        return self.parser.instantiate_classes(self.config.clone())["model"]

    def metadata(self) -> dict[str, Any]:
        """What the record of this run can say before it starts."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False))
        for key in ("record", "ckpt"):  # where the record goes and the weights lie is no part of it
            config.pop(key, None)
        typed = without(without(self.overrides, "--record"), "--ckpt")
        return {**records.metadata(self.recipe, typed), "seed": self.config.seed_everything, "config": config}

    def differences(self, run: Run, part: str) -> list[tuple[str, Any, Any]]:
        """Keys of "model" or "data" in which a run began otherwise than is asked for now, with both values."""
        began = yaml.safe_load(run.config.read_text())
        now = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=True))
        old, new = ({"class_path": side[part]["class_path"], **side[part]["init_args"]} for side in (began, now))
        keys = sorted((old.keys() | new.keys()) - RESUMABLE_KEYS)
        return [(f"{part}.{key}", old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]

    def again(self) -> str:
        """The command that goes on with this run."""
        typed = without(self.overrides, "--run")
        name = self.recipe.name if self.recipe.shipped else str(self.recipe.path)
        return f"{own_name()} " + shlex.join(["fit", name, *typed, "--run", self.run.folder.name])


class ParseOnlyCLI(DarkroomCLI):
    """A command line that is read and checked, but of which nothing is made."""

    def instantiate_classes(self) -> None:
        """Not here."""


def check_keys(recipe: Recipe, keys: list[str]) -> None:
    """Refuse now what `darkroom fit` would refuse on the cluster, hours later.

    Raises:
        Refused: a key or a value is wrong.
    """
    quieten()
    ParseOnlyCLI("fit", recipe, keys)


def without(words: list[str], option: str) -> list[str]:
    """A command line without one of its options and that option's value."""
    kept = [word for word in words if not word.startswith(f"{option}=")]
    if option in kept:
        at = kept.index(option)
        del kept[at : at + 2]
    return kept


def build(command: str, recipe: Recipe, overrides: list[str]) -> DarkroomCLI:
    """All that a command needs.

    Raises:
        Refused: something is wrong with what was asked for.
    """
    # Numbers below 1e-38 are zero: a CPU multiplies them two hundred times as slowly as others, and the gradients of IWAE's
    # worst draws are full of them. Threads are as the one that starts them, so it is said before there are any.
    torch.set_flush_denormal(True)
    quieten()
    try:
        return DarkroomCLI(command, recipe, overrides)
    except ValueError as error:
        if isinstance(error.__cause__, UserError):  # of a constructor of ours; jsonargparse wraps it into many lines
            raise error.__cause__ from None
        raise


@rank_zero_only
def tell(line: str) -> None:
    """Print a line once, however many processes there are."""
    print(line, flush=True)


def quieten() -> None:
    """Silence what Lightning says about things that are meant to be so."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "LightningCLI's args parameter",
        "The '.*_dataloader' does not have many workers",
        "You're resuming from a checkpoint that ended before the epoch ended",
        "isinstance.treespec, LeafSpec.",
        "``instantiate_classes`` was deprecated",
        "Couldn't infer the batch indices",
        "The `srun` command is available on your system but is not used",  # a login node, or a job that is not a step
        "It is recommended to use `self.log",  # our measures have gathered theirs already
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
