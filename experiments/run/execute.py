"""A recipe and overrides become a Trainer's run."""

import errno

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.errors import UserError
from experiments.run.evaluate import measure
from experiments.run.fit import fit
from experiments.run.lightning_cli import DarkroomCLI, build
from experiments.run.predict import predict
from experiments.run.recipes import Recipe


def execute(command: str, recipe: Recipe, overrides: list[str]) -> DarkroomCLI:
    """Carry out a command.

    Returns:
        What carried it out, with its model and its run.

    Raises:
        Refused: something is wrong with what was asked for.
        SystemExit: the run was interrupted.
    """
    cli = build(command, recipe, overrides)
    try:
        COMMANDS[command](cli)
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from None
    except OSError as error:
        if error.errno not in NO_ROOM or command != "fit":
            raise
        place = error.filename or cli.run.folder
        raise UserError(f"cannot write to {place}: {error.strerror}; with room for it, go on with: {cli.again()}") from None
    return cli


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
COMMANDS = {"fit": fit, "validate": measure, "test": measure, "predict": predict}
