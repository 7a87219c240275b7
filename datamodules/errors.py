"""What a user can mend."""


class Refused(Exception):
    """Something cannot be done as asked; the message says in one line what is wrong and what to do."""
