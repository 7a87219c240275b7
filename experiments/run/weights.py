"""Which weights a command uses: those named, else the newest finished run's, else those committed, else none."""

import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from callbacks.run.checkpoints import load_weights
from datamodules.errors import UserError
from experiments.run.lightning_cli import DarkroomCLI
from experiments.run.run_dir import finished_runs

# What reading a file of something else, or half a checkpoint, may end with.
UNREADABLE = (EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, UnpicklingError, struct.error)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint, tensors and plain data alone; its tensors are read when they are needed.

    Raises:
        Refused: it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UNREADABLE:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} cannot be read as weights: it is damaged, or no checkpoint (.ckpt, .safetensors)")
    return content


def fill(cli: DarkroomCLI) -> Path | None:
    """Fill the model with the weights to use; their path."""
    path = weights(cli)
    if path is not None:
        if path.suffix != ".safetensors":
            read_checkpoint(path)
        load_weights(cli.model, path)
    return path


def weights(cli: DarkroomCLI) -> Path | None:
    """The weights to use: those named, else of the newest finished run, else those committed; None if there are none to learn.

    Raises:
        Refused: there are none.
    """
    if cli.config.ckpt:
        if not Path(cli.config.ckpt).is_file():
            raise UserError(f"--ckpt: no file {cli.config.ckpt}")
        return Path(cli.config.ckpt)
    if not list(cli.model.parameters()):
        return None
    for run in finished_runs(cli.recipe):
        if not cli.differences(run, "model"):
            return run.checkpoints / "best.ckpt"
    if cli.recipe.weights.exists():
        return cli.recipe.weights
    raise UserError(f"no weights for {cli.recipe.name} yet: darkroom fit {cli.recipe.name}, or name some by --ckpt")
