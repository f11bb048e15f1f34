"""Defines errors for mistakes that the user can correct, and the exit codes of processes.

The command line prints a `UserError` as one message and ends with exit code 2. Any other exception
is a bug of this package, and the command line prints its traceback.
"""

import errno
import importlib.util
import os

FAILED = 1  # The command failed while it was running.
SAVED_REQUEUE_ME = 75  # A scheduler may start the same command again (EX_TEMPFAIL).

# The disk is full, a quota is used up, or a file exceeds the limit of `ulimit -f`.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_space(error: BaseException) -> int | None:
    """Returns the `errno` of a full disk, also if a library reports one in an error of its own."""
    return next((code for code in NO_SPACE if os.strerror(code) in str(error)), None)


class UserError(ValueError):
    """The user has to change an input; the message gives the value, the rule and the remedy."""


class MissingFileError(UserError, FileNotFoundError):
    """The user named a file or a folder that does not exist."""


class NotFiniteError(UserError, FloatingPointError):
    """A model computes NaN or infinity, because its weights are damaged or too large."""


def require(package: str, extra: str, purpose: str) -> None:
    """Raises a `UserError` if an optional package is absent; call it before the import.

    Args:
      package: import name, such as "pyarrow".
      extra: the extra of `setup.py` that installs the package.
      purpose: what needs the package, such as "a parquet: source".
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{purpose} needs the package {package}, which is not installed; "
            f"pip install 'mobilellm-jax[{extra}]'."
        )
