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
        """Parse the options of a command; other words are returned if they override keys, as in --model.size 32.

        Raises:
            UserError: an unknown option without a dot, such as a misspelled one; --compile and --seed_everything are keys too.
        """
        args, overrides = self.parse_known_args(argv)
        for name in (word.partition("=")[0] for word in overrides if word.startswith("--")):
            if "." not in name and name not in ("--compile", "--seed_everything"):
                self.error(f"unrecognized arguments: {name}")
        return args, overrides

    def error(self, message: str) -> NoReturn:
        """Raise the message as a UserError; for a misspelled option, suggest the closest one."""
        if mistyped := re.match(r"unrecognized arguments: (\S+)", message):
            matches = get_close_matches(mistyped[1], self._option_string_actions, n=1, cutoff=0.4)
            message = f"unknown argument {mistyped[1]}" + (f"; did you mean '{matches[0]}'?" if matches else "")
        raise UserError(f"{self.prog.removeprefix('darkroom ')}: {message}")
