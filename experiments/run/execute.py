"""Run `darkroom fit`, `validate`, `test` or `predict` on a recipe with overrides."""

import atexit
import errno

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.errors import UserError
from experiments.run.evaluate import evaluate
from experiments.run.fit import fit
from experiments.run.lightning_cli import DarkroomCLI, build_cli
from experiments.run.predict import predict
from experiments.run.recipes import Recipe


def execute(command: str, recipe: Recipe, overrides: list[str]) -> DarkroomCLI:
    """Run a command.

    Returns:
        The CLI object, with its model, datamodule, trainer and run.

    Raises:
        UserError: the recipe, an override or a file is invalid.
        SystemExit: the run was interrupted.
    """
    cli = build_cli(command, recipe, overrides)
    # Destroy the process groups before the interpreter exits. Otherwise, a gloo thread that frees a tensor needs the GIL and
    # aborts the process. Lightning destroys process groups only for NCCL.
    atexit.register(destroy_process_groups)
    try:
        COMMANDS[command](cli)
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from None
    except OSError as error:
        if error.errno not in DISK_ERRORS or command != "fit":
            raise
        path = error.filename or cli.run.folder
        raise UserError(
            f"cannot write to {path}: {error.strerror}. When it is writable, resume with: {cli.resume_command()}"
        ) from None
    return cli


def destroy_process_groups() -> None:
    """Wait for the threads of all process groups and close their connections."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
COMMANDS = {"fit": fit, "validate": evaluate, "test": evaluate, "predict": predict}
