"""argparse whose complaints are one line."""

import argparse
import re
from difflib import get_close_matches
from typing import NoReturn

from datamodules.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse in one line, with the nearest option."""
        if mistyped := re.match(r"unrecognized arguments: (\S+)", message):
            near = get_close_matches(mistyped[1], self._option_string_actions, n=1, cutoff=0.4)
            message = f"unknown argument {mistyped[1]}" + (f"; did you mean '{near[0]}'?" if near else "")
        raise UserError(f"{self.prog.removeprefix('darkroom ')}: {message}")
