"""Checks of a configuration before any class is created, and of the words of a command line."""

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from datamodules.catalog.catalog import HELD_OUT, find_source
from datamodules.errors import UserError
from experiments.run.recipes import Recipe
from modules.training.stages import StagePlan

TEST_OPTIONS = ("--data.test", "--data.init_args.test")
MAX_BATCH_SIZE = 2**16
MAX_CPU_PROCESSES = 64
# Options that Darkroom sets, and the option to use instead.
MANAGED_OPTIONS = {
    "--trainer.val_check_interval": "--val_every_images",
    "--trainer.check_val_every_n_epoch": "--val_every_images",
    "--trainer.logger": "--log for logs in addition to metrics.csv",
    "--trainer.default_root_dir": "--run, and DARKROOM_RUNS for the folder of all runs",
    "--data.seed": "--seed_everything",
    "--data.init_args.seed": "--seed_everything",
    "--model.seed": "--seed_everything",
    "--model.init_args.seed": "--seed_everything",
    "--trainer.accumulate_grad_batches": "--accumulate_grad_batches",
    "--trainer.gradient_clip_val": "max_grad_norm of a Phase, in the method's file",
}
# Settings of the Trainer that have no meaning here, and what to use instead.
UNSUPPORTED_SETTINGS = {
    "overfit_batches": "Use a folder of few images as data.train",
    "fast_dev_run": "Use a small model.total_images",
    "barebones": "Use darkroom bench to measure the speed",
    "min_epochs": "Use model.total_images",
    "min_steps": "Use model.total_images",
    "reload_dataloaders_every_n_epochs": "Remove it: training has one epoch",
}


def check_recipe(recipe: Recipe) -> None:
    """Refuse keys of a recipe that Darkroom sets. The configuration of a run contains their default values.

    Raises:
        UserError: a key is set by Darkroom, or `log` is not a list.
    """
    content = recipe.content
    if "log" in content and not isinstance(content["log"], list):
        given = "null" if content["log"] is None else content["log"]
        raise UserError(f"{recipe.path}: log: {given} is not a list. Write [{content['log'] or 'csv'}]")
    batch_size, val_every_images = content["data"].get("init_args", {}).get("batch_size"), content.get("val_every_images")
    defaults: dict[str, Any] = {"accumulate_grad_batches": 1}
    if isinstance(batch_size, int) and isinstance(val_every_images, int):
        defaults["val_check_interval"] = max(1, val_every_images // batch_size)
    for option, advice in MANAGED_OPTIONS.items():
        section, *inner = option.removeprefix("--").split(".")
        value: Any = content.get(section)
        for key in inner:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None or value == defaults.get(inner[-1]):
            continue
        raise UserError(f"{recipe.path}: {option.removeprefix('--')}: set by Darkroom. Use {advice}")


def check_data(data: Any) -> None:
    """Check the sizes of a datamodule and the names of its datasets.

    Args:
        data: the arguments of the datamodule, a Namespace.

    Raises:
        UserError: a number is out of range, or a name is empty.
    """
    if not 1 <= data.batch_size <= MAX_BATCH_SIZE:
        raise UserError(f"data.batch_size: {data.batch_size} must be from 1 to {MAX_BATCH_SIZE:,}")
    limit = max(64, 4 * (os.cpu_count() or 1))
    if not 0 <= data.num_workers <= limit:
        raise UserError(f"data.num_workers: {data.num_workers} must be from 0 to {limit} on this machine")
    for key in ("train", "val", "images", "masks"):
        if data.get(key) == "":
            raise UserError(f"data.{key} is empty. Name a dataset or a folder")
    if "" in (data.get("test") or []):
        raise UserError("data.test: a name is empty. Name datasets or folders, or use []")


def check_sources(data: Any, elsewhere: bool) -> list[str]:
    """Check the names of the datasets and folders of a datamodule without reading them.

    Args:
        data: the arguments of the datamodule, a Namespace.
        elsewhere: whether another machine reads them, which can have other folders, such as a local disk.

    Returns:
        Names of datasets that are not installed on this machine, and absolute paths that it does not have.

    Raises:
        UserError: a folder or file does not exist, or there is no dataset with a name.
    """
    paths = {f"data.{key}": path for key in ("images", "masks") if isinstance(path := data.get(key), str)}
    names = [data.get("train"), data.get("val"), *(data.get("test") or [])]
    absent = []
    for key, path in paths.items():
        if not Path(path).exists():
            if not (elsewhere and Path(path).is_absolute()):
                raise UserError(f"{key}: no file or folder {path}. Check the path")
            absent.append(path)
    for name in names:
        if elsewhere and name and Path(name).is_absolute() and not Path(name).exists():
            absent.append(name)
        elif name and name != HELD_OUT and (entry := find_source(name)) and entry.status() != "installed":
            absent.append(entry.name)
    return list(dict.fromkeys(absent))


def check_trainer(settings: dict[str, Any]) -> None:
    """Refuse settings of the Trainer that contradict a training by images seen, before the first step.

    Raises:
        UserError: a setting is not supported; the message names what to use instead.
    """
    for name, advice in UNSUPPORTED_SETTINGS.items():
        if settings.get(name):
            raise UserError(f"trainer.{name}: {settings[name]} is not supported. {advice}")
    if (epochs := settings.get("max_epochs")) not in (None, -1):
        raise UserError(f"trainer.max_epochs: {epochs} is not supported. Use model.total_images")
    for name in ("max_steps", "limit_train_batches", "limit_test_batches", "limit_predict_batches"):
        if settings.get(name) == 0:
            raise UserError(f"trainer.{name}: 0 leaves nothing to do. Remove it")
    devices = settings.get("devices")
    limit = max(MAX_CPU_PROCESSES, os.cpu_count() or 1)
    if str(devices).isdecimal() and int(str(devices)) > limit:
        raise UserError(f"trainer.devices: {devices} processes are too many for this machine. Use at most {limit}")


def check_finite(config: Any, key: str = "") -> None:
    """Check that all numbers of a configuration are finite.

    Raises:
        UserError: one is infinite or not a number.
    """
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list | tuple) else ()
    for name, value in items:
        path = f"{key}.{name}".lstrip(".").replace(".init_args.", ".")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {value} is not a finite number. Choose another value")
        check_finite(value, path)


def check_batch_sizes(method: Any, batch_size: int, accumulate: int, processes: int) -> None:
    """Check that the global batch of each stage can be divided into equal micro-batches.

    Args:
        method: method, for its stages.
        batch_size: global batch size of the datamodule.
        accumulate: micro-batches per process.
        processes: number of processes.

    Raises:
        UserError: it cannot.
    """
    for size in StagePlan(method.stages(), batch_size).batch_sizes:
        if size % (accumulate * processes):
            name = "data.batch_size" if size == batch_size else "model.batch_sizes or data.batch_size"
            divisor = f"{processes} processes x --accumulate_grad_batches {accumulate}"
            raise UserError(f"{name}: {size} is not divisible by {divisor}. Use a multiple of the product")


# Command line


def option_value(argv: list[str], option: str) -> str | None:
    """Return the value of an option in a list of arguments; None if it is absent."""
    for word, following in pairwise([*argv, ""]):
        if word == option or word.startswith(f"{option}="):
            return following if word == option else word.partition("=")[2]
    return None


def typed_keys(argv: list[str]) -> set[str]:
    """Return the keys of the options in a list of arguments, such as "data.size"."""
    names = (word.partition("=")[0] for word in argv if word.startswith("--"))
    return {name.removeprefix("--").replace(".init_args.", ".") for name in names}


def list_of_one(argv: list[str]) -> list[str]:
    """Return the arguments with the value of --data.test as a list, if it names one dataset or folder."""
    words: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        if words and words[-1] in TEST_OPTIONS and not word.startswith(("[", "--")) and word != "null":
            words.append(json.dumps([word]))
        elif equals and name in TEST_OPTIONS and not value.startswith("["):
            words.append(f"{name}={json.dumps([value])}")
        else:
            words.append(word)
    return words
