"""Lets a run go on if something other than its steps and checkpoints fails.

Metrics, curves, samples, evaluations and the progress bar are side records. If one of them fails, a
warning says so, and training goes on. Checkpoints are not side records: `checkpoint/saving.py`
repeats a save that failed.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from mobilellm_jax.processes import distributed

_WAIT_AFTER_ERROR_SEC = 60.0  # Longest wait of a process with an error for the other processes.
_LONGEST_ERROR = 2000  # Longest error in characters that a process tells the others.

_log = logging.getLogger(__name__)


class SideRecords:
    """Turns the errors of side records into warnings, and remembers them for the end of the run."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}  # Last error of each side record that has failed.
        self._failing: set[str] = set()  # Side records whose last attempt failed.

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Logs an error of the block instead of raising it; `what` names the side record.

        If the same side record fails again and again, only its first failure is logged.
        """
        try:
            yield
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            # An error of the system needs no traceback, because its text names the cause.
            trace = not isinstance(error, OSError)
            if what not in self._failing:
                _log.warning(f"FAILED {what} ({why}); training goes on.", exc_info=trace)
            self.failed[what] = why
            self._failing.add(what)
        else:
            if what in self._failing:
                self._failing.remove(what)
                _log.info(f"{what} works again")

    @contextlib.contextmanager
    def attempt_together(self, what: str) -> Iterator[None]:
        """Like `attempt`, for a block that all processes run together.

        At its end, the processes wait for each other. If all of them arrive there, no process waits
        for another inside the block, so training can go on. The error is raised if another process
        does not arrive, because it may wait for this process. It is also raised if it comes from a
        program on the devices, because the devices of the processes may then be out of step.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        if jax.process_count() > 1:
            error = _error_of_any(what, error)
        with self.attempt(what):
            if error is not None:
                raise error


def _error_of_any(what: str, own: Exception | None) -> Exception | None:
    """Waits until all processes have left a block; returns the error of this or another process.

    `own` is the error of this process, or None.
    """
    if isinstance(own, jax.errors.JaxRuntimeError):
        raise own
    text = "" if own is None else f"{type(own).__name__}: {own}"[:_LONGEST_ERROR]
    limit = {} if own is None else {"timeout_sec": _WAIT_AFTER_ERROR_SEC}
    try:
        errors = distributed.errors_of_all(what, text, **limit)
    except distributed.DistributedError as missing:
        raise (own or missing) from None
    for process, error in enumerate(errors):
        if error and own is None:
            return distributed.DistributedError(f"in process {process}: {error}")
    return own


class AppendedFile:
    """A file to which a run appends; it holds the whole content of a call or nothing of it.

    Content that could not be written stays in memory, and the next call writes it first. The file
    stays open, so the run folder may be renamed. If somebody deletes the file, the next call
    creates it again and begins with `header`.
    """

    def __init__(self, run: Path, name: str, header: bytes = b"") -> None:
        self._run, self._path, self._header = run, run / name, header
        self._waiting = b""
        self._descriptor = self._open()

    def append(self, content: bytes) -> None:
        """Appends `content`; raises an `OSError` if that is impossible for now."""
        self._waiting += content
        if not os.fstat(self._descriptor).st_nlink:
            deleted, self._descriptor = self._descriptor, self._open()
            os.close(deleted)
            _log.warning(f"{self._path} was deleted; later records go into a new file.")
        self._write()

    def close(self) -> None:
        """Closes the file; raises an `OSError` if the content in memory cannot be written."""
        try:
            self._write()
        finally:
            os.close(self._descriptor)

    def _open(self) -> int:
        if self._run.is_dir():  # Otherwise the run folder was deleted, and opening raises an error.
            self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o644)
        if not os.fstat(descriptor).st_size:
            self._waiting = self._header + self._waiting
        return descriptor

    def _write(self) -> None:
        size, rest = os.fstat(self._descriptor).st_size, self._waiting
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self._waiting = b""
