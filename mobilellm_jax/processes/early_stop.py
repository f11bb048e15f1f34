"""SIGTERM where there is no step to finish: the process ends, and asks to be started again.

The training loop has its own handler, which finishes a step and saves. Before the first step
(preparing data, restoring, compiling) and after the last nothing is lost by ending: whatever is
written is whole or absent, as after a kill.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self

from mobilellm_jax.processes.exit_codes import SAVED_REQUEUE_ME

_farewells: list[Callable[[], None]] = []


@contextlib.contextmanager
def farewell(call: Callable[[], None]) -> Iterator[None]:
    """Has `call` made, in another thread, if the process is stopped in the `with` block."""
    _farewells.append(call)
    try:
        yield
    finally:
        _farewells.remove(call)


class EarlyStop:
    """Ends the process with 75 on SIGTERM in the `with` block.

    By a thread: a handler in Python runs only when the main thread comes back from C, out of a
    compiler after minutes, and an exception raised there gets lost where libraries call back.
    """

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="early stop", daemon=True).start()
        self._old = signal.signal(signal.SIGTERM, self._leave_it_to_the_thread)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._old)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write_end)

    def _leave_it_to_the_thread(self, _: int, __: FrameType | None) -> None:
        pass

    def _watch(self) -> None:
        while number := os.read(self._read_end, 1):
            # In the training loop the signal is the loop's.
            ours = signal.getsignal(signal.SIGTERM) == self._leave_it_to_the_thread
            if number[0] == signal.SIGTERM and ours:
                text = "SIGTERM: no step is under way; stopping. The same command again goes on."
                print(text, file=sys.stderr, flush=True)
                for call in _farewells[::-1]:
                    with contextlib.suppress(OSError):
                        call()
                os._exit(SAVED_REQUEUE_ME)
        os.close(self._read_end)
