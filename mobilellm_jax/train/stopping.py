"""Decides when a run stops before its last step: after a signal, or shortly before a time limit.

Times are differences of `time.monotonic`, so a change of the system clock has no effect.
"""

import math
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Literal

from mobilellm_jax.config import ConfigError
from mobilellm_jax.processes.early_stop import stop_signals

_LATEST = 16  # Number of remembered durations of each kind.
_UNKNOWN_SAVE_SHARE = 0.1  # Assumed time of an unmeasured save, as a share of the limit.
_UNKNOWN_SAVE_MAX_SEC = 300.0  # Upper bound of this assumed time.
_EXIT_SHARE = 0.01  # Time for closing files, as a share of the limit.
_UNITS_SEC = {"d": 86_400, "h": 3600, "m": 60, "s": 1}


class StopRequest:
    """Remembers the first SIGTERM, SIGHUP or SIGINT; after that, SIGINT ends the process at once.

    A second SIGTERM has no effect, because schedulers repeat the signal. The operating system, not
    Python, handles the second SIGINT, so this signal also ends a process that waits inside a
    library. Complete checkpoints then stay, and an unfinished save leaves no checkpoint.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._old: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread, and only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (*stop_signals(), signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            signal.signal(signal.SIGINT, signal.SIG_DFL)


class Walltime:
    """The time limit of a run, and the measured times of steps, saves and evaluations (`look`).

    With an infinite limit, the time is never up. The processes of a run may measure different
    times. The loop stops all processes when the first process reaches its limit.
    """

    def __init__(
        self, limit_sec: float = math.inf, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit_sec = limit_sec
        self._now = now
        self._began = now()
        self._taken: dict[str, deque[float]] = {}

    @property
    def needs_a_save(self) -> bool:
        """Whether the run has a time limit but has not measured yet how long a save takes."""
        return math.isfinite(self.limit_sec) and "save" not in self._taken

    def measured(self, what: Literal["step", "save", "look"], seconds: float) -> None:
        self._taken.setdefault(what, deque(maxlen=_LATEST)).append(seconds)

    def is_up(self, look_is_near: bool) -> bool:
        """Returns whether the run has to stop now in order to save before the limit.

        The estimate includes two steps, because the processes take one more step until they agree
        to stop. It also includes two saves, because a save may have to wait for an earlier save.
        """
        unknown_save = min(_UNKNOWN_SAVE_MAX_SEC, _UNKNOWN_SAVE_SHARE * self.limit_sec)
        ahead = 2 * self._longest("step") + 2 * self._longest("save", unknown_save)
        if look_is_near:
            ahead += self._longest("look")
        return self._now() - self._began + ahead >= (1 - _EXIT_SHARE) * self.limit_sec

    def _longest(self, what: str, unknown: float = 0.0) -> float:
        return max(self._taken.get(what, ()), default=unknown)


def parse_duration(flag: str, text: str) -> float:
    """Reads "3h50m", "90m", "1d12h", "5400s", "5400" or Slurm's "3:50:00" as seconds.

    Other text, or a time of 0, raises a `ConfigError`.
    """
    seconds: float | None = None
    with_units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if match := with_units or re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        numbers = zip(match.groups(), _UNITS_SEC.values(), strict=True)
        seconds = math.fsum(int(number) * unit for number, unit in numbers if number)
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    if not seconds:
        raise ConfigError(
            f"{flag}={text} must be a time such as 3h50m, 5400 (seconds) or Slurm's 3:50:00, "
            "greater than 0."
        )
    return seconds
