"""Separates mistakes of the user, shown as one message, from bugs, shown with a traceback."""

import errno

from mobilellm_jax.errors import NO_SPACE, UserError

_PATH_REFUSED = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


class UsageError(UserError):
    """A mistake on the command line, such as an unknown command or a missing flag."""


def is_bad_input(error: Exception) -> bool:
    """Returns whether the user can correct the error.

    The user can correct every `UserError`, a full disk, and a path that cannot be used.
    """
    if isinstance(error, UserError):
        return True
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    if not isinstance(error, OSError) or error.filename is None:
        return False
    return isinstance(error, _PATH_REFUSED) or error.errno == errno.EROFS


def message(error: Exception) -> str:
    """Returns the text of an error; for an `OSError`, this is the path and the reason.

    The text may contain names from files, and control characters in such a name could move the
    terminal's cursor. Therefore every character that is not printable is replaced by an escape
    sequence.
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}."
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        where = f"{error.filename}: " if error.filename is not None else ""
        text = (
            f"{where}{error.strerror}. Free some space, or name an output on another disk, and "
            "start the same command again."
        )
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
