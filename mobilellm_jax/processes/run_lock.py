"""One run per folder: a lock that names its holder, and that does not outlive it.

`run.lock` in the folder holds an advisory lock of the operating system (`flock`) and a line about
its holder. The kernel lets go of the first when the holder dies; NFS 4, and Lustre where it is
mounted with flock, hold it across hosts. Where a file system has no such lock, or keeps it to each
host, the line decides: its holder counts up in it all the time, and a count that stands still is a
holder that is gone. No clock is compared with another host's.
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobilellm_jax.config import ConfigError
from mobilellm_jax.processes.early_stop import farewell
from mobilellm_jax.storage import strict_json

LOCK = "run.lock"
BEAT_SEC = 5.0  # between two counts of a holder
SILENT_SEC = 60.0  # without a count, a holder on another host counts as gone
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def to_stderr(text: str) -> None:
    """Prints a line that must be seen."""
    print(text, file=sys.stderr, flush=True)


class LockLostError(RuntimeError):
    """Another run has taken over the folder of this one, which seemed dead to it."""


class RunLock:
    """The right of this process to write in a run folder, while the `with` block lasts.

    Raises:
      ConfigError: on entering, if another run holds it; the message names host, process, time and
        command.
    """

    def __init__(self, folder: Path, report: Callable[[str], None] = to_stderr) -> None:
        self._path, self._report = folder / LOCK, report
        self._me = _this_process()
        self._stop = threading.Event()
        self._descriptor = -1
        self._farewell = farewell(self._let_go)
        self._beats: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        # First: a process that is stopped between the lock and this would leave it behind.
        self._farewell.__enter__()
        try:
            self._take()
        except BaseException:
            self._farewell.__exit__(None, None, None)
            raise
        self._beats = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beats.start()
        return self

    def _take(self) -> None:
        descriptor, flock_works = self._open()
        try:
            holder = _read(descriptor)
            if holder:
                self._check_gone(descriptor, holder, flock_works)
                self._report(
                    f"LOCK: {_name(holder)} had {self._path} and ended without letting go; "
                    "this process takes over."
                )
            self._descriptor = descriptor
            self._write(0)
        except BaseException:
            os.close(descriptor)
            raise

    def __exit__(self, *_: object) -> None:
        self._farewell.__exit__(None, None, None)
        with contextlib.suppress(OSError):
            self._let_go()
        os.close(self._descriptor)

    def _let_go(self) -> None:
        self._stop.set()
        if self._beats is not None:
            self._beats.join()
        if self._is_ours():
            self._path.unlink()

    def check(self) -> None:
        """Checks that the folder is still this run's, before something final is written to it.

        Raises:
          LockLostError: if another run has taken over.
          OSError: if the folder has gone or cannot be read.
        """
        if not self._is_ours():
            taker = _name(_parsed(self._path.read_bytes()))
            raise LockLostError(
                f"{taker} has taken over {self._path.parent}; this process was silent for more "
                f"than {SILENT_SEC:.0f} s and ends here, without another write."
            )

    def _open(self) -> tuple[int, bool]:
        """Returns the locked file, and whether the file system really locks."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            works = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(descriptor)
                os.close(descriptor)
                raise self._held(holder) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(descriptor)
                    raise
                works = False
            # The holder before us may have removed the file between our opening and our locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor, works
            os.close(descriptor)

    def _check_gone(self, descriptor: int, holder: dict[str, Any], flock_works: bool) -> None:
        if holder.get("boot") == self._me["boot"]:
            if not flock_works and _is_alive(holder):
                raise self._held(holder)
            return
        self._report(
            f"LOCK: {_name(holder)} has {self._path}; looking for {SILENT_SEC:.0f} s whether it "
            "still does."
        )
        deadline = time.monotonic() + SILENT_SEC
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENT_SEC / 10))
            now = _read(descriptor)
            if now != holder:
                raise self._held(now or holder)

    def _held(self, holder: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"workdir={str(self._path.parent)!r} is in use by {_name(holder)}; wait for it or stop "
            "it, or choose another --workdir."
        )

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SEC):
            count += 1
            # A full or vanished disk is for whoever has something to write to report.
            with contextlib.suppress(OSError):
                if self._is_ours():
                    self._write(count)

    def _is_ours(self) -> bool:
        holder = _parsed(self._path.read_bytes())
        return {**holder, "count": 0} == {**self._me, "count": 0}

    def _write(self, count: int) -> None:
        # In place, because the lock is the file's and not the name's; a block of it at once.
        line = json.dumps({**self._me, "count": count}).encode()
        os.pwrite(self._descriptor, line, 0)
        os.ftruncate(self._descriptor, len(line))


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),  # for people; nothing is computed with it
        "command": shlex.join(sys.orig_argv),
    }


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that has not said its name yet"
    return (
        f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('since')} as "
        f"`{holder.get('command')}`"
    )


def _read(descriptor: int) -> dict[str, Any]:
    return _parsed(os.pread(descriptor, 1 << 16, 0))


def _parsed(content: bytes) -> dict[str, Any]:
    """Returns what the holder says of itself; nothing where that cannot be read."""
    with contextlib.suppress(strict_json.JsonError):
        found = strict_json.parse(content)
        if isinstance(found, dict):
            return found
    return {}


def _boot() -> str:
    """Returns what tells this start of this machine from any other."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _started(pid: int) -> str:
    """Returns when a process started, in the kernel's ticks, or ""; numbers of processes recur."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _is_alive(holder: dict[str, Any]) -> bool:
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return False
    except PermissionError:
        pass
    return _started(int(holder["pid"])) == holder.get("started")
