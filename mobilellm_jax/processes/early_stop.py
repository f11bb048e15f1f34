"""Ends a process on SIGTERM while no training step runs.

The training loop has its own handler, which finishes a step and saves. Before the first step the
process prepares data, restores or compiles, and after the last step it only writes records. Ending
the process then loses nothing, because every file is whole or absent.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self

from mobilellm_jax.errors import SAVED_REQUEUE_ME

_log = logging.getLogger(__name__)


class Farewells:
    """The calls that a process makes, the oldest first, when SIGTERM ends it.

    The run registers its message to the other processes before it takes its lock. So the others
    hear that this process was stopped, and only then another run can take the folder.
    """

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def during(self, call: Callable[[], None]) -> Iterator[None]:
        """Registers `call` for the `with` block; another thread may call it at any moment."""
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)

    def say(self) -> None:
        """Makes the calls; the log shows what a call raises, and the next call follows."""
        for call in list(self._calls):
            try:
                call()
            except BaseException as error:
                _log.warning(f"While stopping: {type(error).__name__}: {error}")


FAREWELLS = Farewells()  # of this process


class EarlyStop:
    """Ends the process with exit code 75 on SIGTERM in the `with` block.

    A thread ends the process. A Python signal handler runs only when the main thread returns from
    C, which can take minutes in a compiler. Libraries may swallow an exception of a handler.
    """

    def __enter__(self) -> Self:
        self._asked = False  # the handler of this class has run
        self._ending = threading.Event()
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="early stop", daemon=True)
        self._thread.start()
        self._old = signal.signal(signal.SIGTERM, self._take_note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ending.is_set():
            self._thread.join()  # the thread ends the process, with its exit code
        signal.signal(signal.SIGTERM, self._old)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write_end)

    def _take_note(self, _: int, __: FrameType | None) -> None:
        self._asked = True

    def _watch(self) -> None:
        while number := os.read(self._read_end, 1):
            # The training loop installs a handler of its own while it runs steps. If SIGTERM comes
            # just before, this thread may look only after the change. `signal.signal` runs pending
            # handlers before it changes one, so `_asked` is set then.
            ours = self._asked or signal.getsignal(signal.SIGTERM) == self._take_note
            if number[0] == signal.SIGTERM and ours:
                self._ending.set()
                try:
                    _log.warning(
                        "SIGTERM: no step is running; stopping. Start the same command to resume."
                    )
                    FAREWELLS.say()
                finally:
                    os._exit(SAVED_REQUEUE_ME)
        os.close(self._read_end)
