"""Ends a process on SIGTERM or SIGHUP outside the training loop.

The training loop has its own handler, which finishes a step and saves. Before the first step, a
process prepares data, restores or compiles. After the last step, it only writes records. If it
ends at such a time, nothing is lost, because no file has its final name before it is complete.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

from mobilellm_jax.errors import SAVED_REQUEUE_ME

_FAREWELLS_SEC = 30.0  # Longest time for the functions in `FAREWELLS`; then the process ends.

_log = logging.getLogger(__name__)


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that ask a process to stop.

    SIGHUP means that the terminal was closed. The process does not react to it if its caller chose
    to ignore it, as `nohup` does.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]


class Farewells:
    """Functions that a process calls when a signal ends it, in the order of their registration.

    A run first registers the function that tells the other processes that it ends, and then the
    function that releases its lock. So the others know this before another run can lock the folder.
    """

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def during(self, call: Callable[[], None]) -> Iterator[None]:
        """Registers `call` for the `with` block; another thread may run `call` at any time."""
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)

    def say(self) -> None:
        """Runs the registered functions; logs an error in one and goes on with the next."""
        for call in list(self._calls):
            try:
                call()
            except BaseException as error:
                with contextlib.suppress(Exception):  # The next function must run in any case.
                    _log.warning(f"While stopping: {type(error).__name__}: {error}")


FAREWELLS = Farewells()  # The functions of this process.


class EarlyStop:
    """Ends the process with exit code 75 if one of `stop_signals` comes in the `with` block.

    A thread ends the process. Python runs a signal handler only when the main thread returns from C
    code, which can take minutes in a compiler. Libraries may also catch a handler's exception.

    Some notebooks run the code of the user outside the main thread, where Python allows no signal
    handlers. The class does nothing there.
    """

    def __enter__(self) -> Self:
        self._asked = False  # Whether the handler of this class has run.
        self._ending = threading.Event()
        self._old: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="early stop", daemon=True)
        self._thread.start()
        for number in stop_signals():
            self._old[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ending.is_set():
            self._thread.join()  # The thread ends the process with exit code 75.
        if not self._old:
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write_end)

    def _take_note(self, _: int, __: FrameType | None) -> None:
        self._asked = True

    def _watch(self) -> None:
        while number := os.read(self._read_end, 1):
            # The training loop installs its own handler. If the signal comes just before that, this
            # thread may find only the new handler. `_asked` is then True, because `signal.signal`
            # runs the pending handlers before it installs a new one.
            ours = self._asked or signal.getsignal(number[0]) == self._take_note
            if number[0] in self._old and ours:
                self._end(signal.Signals(number[0]).name)
        os.close(self._read_end)

    def _end(self, name: str) -> None:
        self._ending.set()
        try:
            # The warning and the functions in `FAREWELLS` may block, as on a paused terminal.
            last = threading.Timer(_FAREWELLS_SEC, os._exit, [SAVED_REQUEUE_ME])
            last.daemon = True
            last.start()
            _log.warning(f"{name}: no step is running; stopping. Start the same command to resume.")
            FAREWELLS.say()
        finally:
            os._exit(SAVED_REQUEUE_ME)
