"""SIGTERM where there is no step to finish: the process ends soon, and asks to be started again.

The training loop has its own handler, which finishes a step and saves. Before the first step
(preparing data, restoring, compiling) and after the last nothing is lost by ending: whatever is
written is whole or absent, as after a kill.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from mobilellm_jax.exit_codes import SAVED_REQUEUE_ME

_UNWIND_SEC = 10.0  # for the main thread to leave what it does; a compiler lets nothing through


class Stopped(BaseException):
    """SIGTERM arrived; no error, so that nothing on the way holds it up."""


class EarlyStop:
    """Ends what the `with` block does on SIGTERM; `asked` says afterwards whether that was so.

    A handler in Python runs only when the main thread comes back from C. So a thread is told of
    the signal too: it says so at once, and ends the process if the main thread takes long.

    Args:
      tell: called by the thread when the signal has come.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self.asked = False
        self._tell = tell
        self._told = threading.Event()

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old = signal.signal(signal.SIGTERM, self._handle)
        threading.Thread(target=self._watch, name="early stop", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if self.asked:
            self._told.wait(_UNWIND_SEC)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.asked else self._old)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write_end)
        if self.asked and kind is not None and kind is not Stopped:
            # What a library has made of it, most likely.
            sys.excepthook(kind, error, trace)  # type: ignore[arg-type]  # both are there
        return self.asked

    def _handle(self, _: int, __: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
            raise Stopped

    def _watch(self) -> None:
        while number := os.read(self._read_end, 1):
            # In the training loop the signal is the loop's.
            if number[0] == signal.SIGTERM and signal.getsignal(number[0]) == self._handle:
                break
        if number:
            text = "SIGTERM: no step is under way; stopping. The same command again goes on."
            print(text, file=sys.stderr, flush=True)
            self._tell()
            self._told.set()
            threading.Event().wait(_UNWIND_SEC)
            os._exit(SAVED_REQUEUE_ME)
        os.close(self._read_end)
