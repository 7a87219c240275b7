"""The base class of errors that the user can fix."""


class UserError(Exception):
    """A request cannot be fulfilled; the message states the problem and the fix in one line."""
