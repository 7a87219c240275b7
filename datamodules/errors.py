"""The base class of errors that the user can fix, and messages: recognized or made safe to print."""

import re

# Control characters, and those that change the direction of the text: the names of files can contain them.
CONTROLS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")


class UserError(Exception):
    """A request cannot be fulfilled; the message states the problem and the fix in one line."""


def escape_controls(text: str) -> str:
    """Return a line for a terminal, with an escape for each control character, such as a newline in the name of a file."""
    return CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def is_dead_worker(error: RuntimeError) -> bool:
    """Return whether an error of torch means that a loader process has died; a signal handler raises it at any place."""
    return str(error).startswith("DataLoader worker")
