"""Tells a user's mistake, which gets one message, from a bug, which gets a traceback.

Bad input reaches the command line as a `ValueError` that this package raises on purpose, or as the
operating system's refusal of a path. A `ValueError` out of a library, or out of an expression that
went wrong here (an unpacking, a reshape), is a bug. Where it was raised tells them apart, since its
type does not (docs/decisions.md, "Bad input or bug").
"""

import dis
import errno
import sysconfig
from pathlib import Path
from types import CodeType, TracebackType

import mobilellm_jax
from mobilellm_jax.config import ConfigError

_PACKAGE = str(Path(mobilellm_jax.__file__).parent)
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_RAISE = dis.opmap["RAISE_VARARGS"]
_PATH_REFUSED = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


class UsageError(ValueError):
    """The command line itself is wrong: an unknown command or flag, or a missing one."""


def is_bad_input(error: ValueError | OSError) -> bool:
    """Returns whether the user, not the program, has to change something.

    That is so for `ConfigError` and `UsageError`; for any other `ValueError` if a `raise` statement
    of this package raised it; for a refused path if this package asked for it, itself or through
    the standard library. The `raise` is looked for in the byte code, because jax takes its own
    frames out of tracebacks: a bug inside jax seems to come from the line of ours that called it.
    """
    if isinstance(error, (ConfigError, UsageError)):
        return True
    steps = _steps(error)
    if not steps:
        return False
    if isinstance(error, OSError):
        if not isinstance(error, _PATH_REFUSED) and error.errno != errno.EROFS:
            return False
        return next((_is_ours(code) for code, _ in steps if not _is_standard(code)), False)
    code, instruction = steps[0]
    return _is_ours(code) and code.co_code[instruction] == _RAISE


def message(error: ValueError | OSError) -> str:
    """Returns the error's own text; for the operating system's errors, path and reason.

    Names that files hold, or have, may not move a terminal's cursor: what is not printable is
    written as Python writes it.
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}."
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def _steps(error: BaseException) -> list[tuple[CodeType, int]]:
    """The code that the error passed through and the instruction it left at, innermost first."""
    steps: list[tuple[CodeType, int]] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        steps.append((trace.tb_frame.f_code, trace.tb_lasti))
        trace = trace.tb_next
    return steps[::-1]


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_PACKAGE)


def _is_standard(code: CodeType) -> bool:
    file = code.co_filename
    if file.startswith("<frozen"):
        return True
    return file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file
