"""Distinguishes mistakes of the user, which get one message, from bugs, which get a traceback."""

import errno

from mobilellm_jax.errors import UserError

_PATH_REFUSED = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


class UsageError(UserError):
    """The command line is wrong: a command or flag is unknown or missing."""


def is_bad_input(error: Exception) -> bool:
    """Returns whether the user has to correct something: a `UserError`, or a refused path."""
    if isinstance(error, UserError):
        return True
    if not isinstance(error, OSError) or error.filename is None:
        return False
    return isinstance(error, _PATH_REFUSED) or error.errno == errno.EROFS


def message(error: Exception) -> str:
    """Returns the error's text; for an error of the operating system, its path and its reason.

    The text may quote names from files, and such a name must not move the terminal's cursor. So
    every character that is not printable is written as an escape sequence.
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}."
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
