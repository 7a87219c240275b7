"""`fit`, `validate`, `test` and `predict`: a recipe and overrides become a Trainer's run."""

import gc
import logging
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import lightning as L
import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.checkpoints import Checkpoints, load_weights
from callbacks.csv_log import CSVLog
from callbacks.preemption import Preemption
from callbacks.preflight import Preflight
from callbacks.progress import ProgressBar
from callbacks.run_record import RunRecord
from callbacks.samples import Samples
from callbacks.write_photos import WritePhotos
from datamodules.catalogue import MissingData
from datamodules.loading import load
from datamodules.photos import Photos, photo_files
from datamodules.refused import Refused
from datamodules.sampler import Slice
from experiments import records
from experiments.complaints import explain, parameters
from experiments.recipes import Recipe
from experiments.runs import Run, newest_finished, open_run, own_name
from modules.lightning_adapter import NoProfiler, Replicas
from modules.method import Method

known_options: list[str] = []  # of the parser that was built last, to name the nearest to a mistyped one


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
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": f"darkroom {command} RECIPE"},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Remember the valid options, to name the nearest to one that is mistyped."""
        options = [option.lstrip("-") for option in parser._option_string_actions]
        for group in ("model", "data"):
            class_path = self.recipe.content.get(group, {}).get("class_path", "")
            options += [f"{group}.{name}" for name in parameters(class_path)]
        known_options[:] = options
        super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The house's own options."""
        parser.add_argument("--monitor", type=str | None, help="logged figure that chooses the best weights")
        parser.add_argument("--validate_every", type=int, default=100_000, help="images between two validations")
        if self.command == "fit":
            parser.add_argument("--run", type=str | None, help="name of the run; goes on with it if it exists")
            parser.add_argument("--wandb", type=Literal["online", "offline"] | None, help="log to Weights & Biases as well")
        else:
            parser.add_argument("--ckpt", type=str | None, help="weights to use: a .ckpt or .safetensors file")
        if self.command == "test":
            parser.add_argument("--record", type=str | None, help="file to write the run record to")
        if self.command == "predict":
            parser.add_argument("--input", type=str, required=True, help="a picture, or a folder of pictures")
            parser.add_argument("--output", type=str, default="out", help="folder for the results")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Refuse keys of model and data that contradict each other; count validations in images."""
        model, data = (self.config[part].init_args for part in ("model", "data"))
        for key in sorted(set(vars(model)) & set(vars(data))):
            if model[key] != data[key]:
                raise Refused(f"model.{key} is {model[key]}, but data.{key} is {data[key]}")
        if data.batch_size < 1:
            raise Refused(f"data.batch_size: {data.batch_size} is not a batch")
        if any(re.match(r"--data\.(init_args\.)?seed\b", word) for word in self.overrides):
            raise Refused("data.seed follows seed_everything: take --seed_everything")
        self.config.trainer.val_check_interval = max(1, self.config.validate_every // data.batch_size)
        self.config.trainer.check_val_every_n_epoch = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer, with the run's callbacks and loggers."""
        self.trainer_defaults["callbacks"] = [Preflight(), ProgressBar(self.config.monitor)]
        if self.command == "test" and self.config.record:
            self.trainer_defaults["callbacks"].append(RunRecord(Path(self.config.record), self.facts()))
        if self.command != "fit":
            return self.checked_trainer()
        self.run = open_run(self.recipe, self.config.run)
        self.trainer_defaults["callbacks"] += [
            Samples(self.run.samples),
            RunRecord(self.run.record, self.facts()),
            Checkpoints(self.run.checkpoints, self.config.monitor),
            Preemption(self.run.checkpoints / "last.ckpt", f"Go on with: {self.again()}"),
        ]
        profiler = self.config_init.trainer.profiler or NoProfiler()
        return self.checked_trainer(default_root_dir=str(self.run.folder), profiler=profiler)

    def checked_trainer(self, **settings: Any) -> L.Trainer:
        """The Trainer, unless its gradients would not be averaged as `modules/gradients.py` does it."""
        try:
            trainer = super().instantiate_trainer(logger=False, **settings)
        except ValueError as error:  # Lightning's own words about settings that do not go together
            raise Refused(" ".join(str(error).split())) from None
        if not isinstance(trainer.strategy, SingleDeviceStrategy | Replicas):
            raise Refused(f"trainer.strategy: {type(trainer.strategy).__name__} is not supported; take 'auto' or 'ddp'")
        return trainer

    def facts(self) -> dict[str, Any]:
        """What the record of this run can say before it starts."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False))
        return {**records.facts(self.recipe, self.overrides), "seed": self.config.seed_everything, "config": config}

    def again(self) -> str:
        """The command that goes on with this run."""
        typed = [word for word in self.overrides if not word.startswith("--run=")]
        if "--run" in typed:
            at = typed.index("--run")
            del typed[at : at + 2]
        name = self.recipe.name if self.recipe.path.parent.name == "recipes" else str(self.recipe.path)
        return f"{own_name()} " + shlex.join(["fit", name, *typed, "--run", self.run.folder.name])


def execute(command: str, recipe: Recipe, overrides: list[str]) -> DarkroomCLI:
    """Carry out a command.

    Returns:
        What carried it out, with its model and its run.

    Raises:
        Refused: something is wrong with what was asked for.
        SystemExit: the run was interrupted.
    """
    quieten()
    try:
        cli = DarkroomCLI(command, recipe, overrides)
    except jsonargparse.ArgumentError as error:
        raise Refused(explain(str(error), known_options)) from None
    except (yaml.YAMLError, MisconfigurationException) as error:
        raise Refused(" ".join(str(error).split())) from None
    except ValueError as error:
        if isinstance(error.__cause__, Refused):  # of a constructor of ours; jsonargparse wraps it into many lines
            raise error.__cause__ from None
        raise
    try:
        COMMANDS[command](cli)
    except MisconfigurationException as error:
        raise Refused(" ".join(str(error).split())) from None
    return cli


def fit(cli: DarkroomCLI) -> None:
    """Train, or go on training; then measure the best weights on the test sets that are here."""
    run, trainer, model = cli.run, cli.trainer, cli.model
    if not list(model.parameters()):
        raise Refused(f"{type(model).__name__} has nothing to train: darkroom test {cli.recipe.name} measures it")
    with alone(cli, run):
        resumed_at, checkpoint = prepare(cli, run)
        trainer.loggers = loggers(cli, run, resumed_at)
        measurable = can_be_measured(cli)
        settle_memory()
        trainer.fit(model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        if measurable:
            load_weights(model, run.checkpoints / "best.ckpt")
            trainer.loggers = []
            trainer.test(model, cli.datamodule, verbose=False)
            say_results(trainer, cli)
    tell(f"run       {run.folder}")


@contextmanager
def alone(cli: DarkroomCLI, run: Run) -> Iterator[None]:
    """Make the run's folder and hold it against other commands; the system frees it when this process ends."""
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        if not cli.trainer.is_global_zero:
            yield
            return
        with FileLock(run.folder / ".lock", blocking=False):
            yield
    except Timeout:
        raise Refused(f"run '{run.folder.name}' is being written by another process; another --run starts anew") from None


def can_be_measured(cli: DarkroomCLI) -> bool:
    """Whether some test set is here; a damaged or mistyped one is refused now, not when training has ended."""
    if not cli.datamodule.test:
        return False

    try:
        deepcopy(cli.datamodule).setup("test")
    except MissingData as error:
        tell(f"not measured after training: {error}")
        return False
    return True


def settle_memory() -> None:
    """Take what is loaded by now out of the garbage collector's rounds, which otherwise cost every step their share."""
    gc.collect()
    gc.freeze()


def prepare(cli: DarkroomCLI, run: Run) -> tuple[int, Path | None]:
    """Find where the run that stands in the folder goes on: images seen, and the checkpoint; leave the configuration there."""
    last = run.checkpoints / "last.ckpt"
    resumed_at, checkpoint = 0, None
    if last.exists():
        resumed_at = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["images_seen"]
        if resumed_at >= cli.model.images:
            raise Refused(
                f"run '{run.folder.name}' is finished after {resumed_at} images; a larger --model.images goes on with it, "
                "another --run starts anew"
            )
        refuse_another_network(cli, run)
        checkpoint = last
        tell(f"going on with {run.folder} after {resumed_at:,} images")
    write_config(cli, run)
    if (free := shutil.disk_usage(run.folder).free) < 2**28:
        raise Refused(f"only {free // 2**20} MiB are free at {run.folder}; at least 256 are needed")
    return resumed_at, checkpoint


def refuse_another_network(cli: DarkroomCLI, run: Run) -> None:
    """A run goes on with the network and the data it began with; budget and learning rate may change."""
    began = yaml.safe_load(run.config.read_text())
    now = yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=True))
    free = {"images", "learning_rate", "warmup", "workers", "test", "skip_bad"}
    if began["monitor"] != now["monitor"]:
        raise Refused(f"run '{run.folder.name}' began with monitor {began['monitor']}, not {now['monitor']}")
    for part in ("model", "data"):
        old, new = ({"class_path": side[part]["class_path"], **side[part]["init_args"]} for side in (began, now))
        for key in sorted((old.keys() | new.keys()) - free):
            if old.get(key) != new.get(key):
                raise Refused(
                    f"run '{run.folder.name}' began with {part}.{key} {old.get(key)}, not {new.get(key)}; "
                    "another --run starts anew"
                )


@rank_zero_only
def write_config(cli: DarkroomCLI, run: Run) -> None:
    """Leave the resolved configuration in the run's folder; `darkroom fit <it>` repeats the run."""
    config = cli.config.clone()
    config.pop("run")
    run.config.write_text(cli.parser.dump(config, skip_link_targets=True, skip_validation=True))


def loggers(cli: DarkroomCLI, run: Run, resumed_at: int) -> list[Logger]:
    """The CSV log, and Weights & Biases if asked for."""
    found: list[Logger] = [CSVLog(run.log, resumed_at)]
    if cli.config.wandb:
        from lightning.pytorch.loggers import WandbLogger

        name = f"{cli.recipe.name}/{run.folder.name}"
        offline = cli.config.wandb == "offline"
        if not offline and not (os.environ.get("WANDB_API_KEY") or Path.home().joinpath(".netrc").exists()):
            raise Refused("--wandb online needs an account: run `wandb login` first, or take --wandb offline")
        identity = re.sub(r"\W", "-", name)
        found.append(WandbLogger(name, run.folder, id=identity, project="darkroom", offline=offline, resume="allow"))
    return found


def measure(cli: DarkroomCLI) -> None:
    """`validate` or `test`: measure weights."""
    path = ready(cli)
    tell(f"weights   {path or 'none needed'}")
    run = cli.trainer.test if cli.command == "test" else cli.trainer.validate
    run(cli.model, cli.datamodule, verbose=False)
    say_results(cli.trainer, cli)


def predict(cli: DarkroomCLI) -> None:
    """Enlarge a user's own pictures into the output folder."""
    path = ready(cli)
    output = Path(cli.config.output)
    try:
        files = photo_files(cli.config.input)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"cannot write to {output}: {error.strerror}") from None
    tell(f"weights   {path or 'none needed'}")
    targets = output_paths(files, Path(cli.config.input), output)
    rank, world = cli.trainer.global_rank, cli.trainer.world_size
    loader = load(Photos(files), Slice(len(files), rank, world))
    cli.trainer.callbacks.append(WritePhotos(targets))
    cli.trainer.predict(cli.model, loader, return_predictions=False)


def output_paths(files: list[Path], source: Path, output: Path) -> dict[str, Path]:
    """Where each enlarged picture goes: the folders below `source` are kept, everything is PNG."""
    base = source if source.is_dir() else source.parent
    inputs = {file.resolve() for file in files}
    targets: dict[str, Path] = {}
    for file in files:
        target = output / file.relative_to(base).with_suffix(".png")
        if target in targets.values():  # photo.jpg and photo.png side by side
            target = target.with_name(f"{file.name}.png")
        if target.resolve() in inputs:
            raise Refused(f"{target} is one of the inputs and would be overwritten; name another --output")
        targets[str(file)] = target
    return targets


def ready(cli: DarkroomCLI) -> Path | None:
    """Fill the model with the weights to use; their path."""
    path = weights(cli)
    if path is not None:
        load_weights(cli.model, path)
    return path


def weights(cli: DarkroomCLI) -> Path | None:
    """The weights to use: those named, else of the newest finished run, else those committed; None if there are none to learn.

    Raises:
        Refused: there are none.
    """
    if cli.config.ckpt:
        if not Path(cli.config.ckpt).is_file():
            raise Refused(f"--ckpt: no file {cli.config.ckpt}")
        return Path(cli.config.ckpt)
    if not list(cli.model.parameters()):
        return None
    if run := newest_finished(cli.recipe):
        return run.checkpoints / "best.ckpt"
    if cli.recipe.weights.exists():
        return cli.recipe.weights
    raise Refused(f"no weights for {cli.recipe.name} yet: darkroom fit {cli.recipe.name}, or name some by --ckpt")


def say_results(trainer: Any, cli: DarkroomCLI) -> None:
    """Print the measured figures, a row a data set, and which sets are not here."""
    if not trainer.is_global_zero:
        return
    from rich.console import Console
    from rich.table import Table

    rows: dict[str, dict[str, float]] = {}
    for name, value in trainer.callback_metrics.items():
        data_set, _, protocol = name.partition("/")
        if protocol:
            rows.setdefault(data_set, {})[protocol] = float(value)
    table = Table("data set", *(columns := sorted({protocol for row in rows.values() for protocol in row})))
    for data_set, row in rows.items():
        table.add_row(data_set, *(f"{row[column]:.4f}" if column in row else "" for column in columns))
    Console().print(table)
    for line in cli.datamodule.absent:
        print(f"not measured: {line}")


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
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


COMMANDS = {"fit": fit, "validate": measure, "test": measure, "predict": predict}
