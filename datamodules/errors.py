"""What a user can mend."""


class UserError(Exception):
    """Something cannot be done as asked; the message says in one line what is wrong and what to do."""
