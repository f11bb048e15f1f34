"""Errors for mistakes that the user can correct.

The command line prints such an error as one message and ends with exit code 2. Any other exception
is a bug of this package, and the command line prints its traceback.
"""


class UserError(ValueError):
    """The user has to change an input; the message gives the value, the rule and the remedy."""


class MissingFileError(UserError, FileNotFoundError):
    """The user named a file or a folder that does not exist."""
