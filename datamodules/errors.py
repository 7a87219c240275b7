"""The base class of errors that the user can fix, and an error of torch that is recognized by its message."""


class UserError(Exception):
    """A request cannot be fulfilled; the message states the problem and the fix in one line."""


def is_dead_worker(error: RuntimeError) -> bool:
    """Return whether an error of torch means that a loader process has died; a signal handler raises it at any place."""
    return str(error).startswith("DataLoader worker")
