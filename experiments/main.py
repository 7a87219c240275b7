"""The `darkroom` command. What needs no network answers at once: torch and Lightning are imported only to run one."""

import sys

from experiments.recipes import UnknownRecipe, find_recipe

RUN = ("fit", "validate", "test", "predict")
COMMANDS = (*RUN,)


def main(arguments: list[str] | None = None) -> int:
    """Carry out a command line; returns the exit status, 2 for a command that cannot be carried out."""
    words = sys.argv[1:] if arguments is None else arguments
    command, rest = words[0], words[1:]
    try:
        recipe = find_recipe(rest[0])
        from experiments.cli import execute

        execute(command, recipe, rest[1:])
    except UnknownRecipe as error:
        print(f"darkroom: {error}", file=sys.stderr)
        return 2
    return 0
