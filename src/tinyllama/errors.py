"""The one exception for what a user can mend: the command line prints it as one line and exits with status 2."""


class InputError(ValueError):
    """Wrong input: the message names the place, the value and the remedy, in one line."""
