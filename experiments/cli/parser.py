"""Argument parser with one-line errors."""

import argparse
import re
from difflib import get_close_matches
from typing import Any, NoReturn

from datamodules.errors import UserError


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises a one-line UserError, and does not accept abbreviated options."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def parse_with_overrides(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse the options of a command, and return the other words, which override keys, as in --model.size 32.

        Raises:
            UserError: a word is a misspelled option of the command.
        """
        args, overrides = self.parse_known_args(argv)
        for name in (word.partition("=")[0] for word in overrides if word.startswith("--")):
            if get_close_matches(name, self._option_string_actions, n=1, cutoff=0.7):
                self.error(f"unrecognized arguments: {name}")
        return args, overrides

    def error(self, message: str) -> NoReturn:
        """Raise the message as a UserError; for a misspelled option, suggest the closest one."""
        if mistyped := re.match(r"unrecognized arguments: (\S+)", message):
            matches = get_close_matches(mistyped[1], self._option_string_actions, n=1, cutoff=0.4)
            message = f"unknown argument {mistyped[1]}" + (f"; did you mean '{matches[0]}'?" if matches else "")
        raise UserError(f"{self.prog.removeprefix('darkroom ')}: {message}")
