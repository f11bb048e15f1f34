"""Lets only one process write in a run folder, and tells others which process that is.

The process that may write (the holder) locks `run.lock` in the folder with `flock`, and writes a
line about itself there. The kernel releases the lock when the holder dies. On NFS 4, and on Lustre
mounted with flock, the lock works across hosts. Other file systems have no such lock, or one that
other hosts do not see. On these, the line shows whether the holder is alive: every few seconds, the
holder increments a counter in the line. If the counter stays the same, the holder is gone. The
processes do not compare clocks of hosts.
"""

import contextlib
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mobilellm_jax.config import ConfigError
from mobilellm_jax.processes.early_stop import FAREWELLS
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.file_lock import FileLock, HeldError

LOCK = "run.lock"
BEAT_SEC = 5.0  # Time between two increments of the counter in `run.lock`.
SILENT_SEC = 60.0  # If a holder on another host does not increment it for this time, it is gone.
_FAREWELL_SEC = 5.0  # Longest wait of a stopping process for `_take` in its main thread.

_log = logging.getLogger(__name__)


class LockLostError(RuntimeError):
    """Another run has taken over the folder, because this run did not update its lock file."""


class RunLock:
    """Lets only this process write in a run folder during the `with` block.

    If another process holds the folder, the block raises a `ConfigError` that names the process.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._me = _this_process()
        self._stop = threading.Event()
        self._changing = threading.Lock()  # Held while a thread takes or removes the file.
        self._lock: FileLock | None = None
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> "RunLock":
        with contextlib.ExitStack() as stack:
            # From here on, SIGTERM can end the process at any time. The lock file is then removed.
            stack.enter_context(FAREWELLS.during(self._let_go))
            with self._changing:
                self._lock = self._take()
            stack.callback(self._release)
            beats = threading.Thread(target=self._beat, name="run lock", daemon=True)
            beats.start()
            stack.callback(beats.join)
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()
        self._exits.close()

    @property
    def last_folder(self) -> Path:
        """The last known path of the run folder; this property does not look at the disk."""
        return self._path.parent

    def folder(self) -> Path:
        """Returns the run folder, also if somebody has renamed it since it was locked.

        If somebody has deleted the folder or the locked file, the method creates it again. Call it
        in the thread that took the lock.

        Raises:
          LockLostError: if another run holds the folder.
          OSError: if the folder was deleted and cannot be created, or cannot be read.
        """
        self._follow()
        if not self._path.exists():
            self._create_again()
        if not self._is_ours():
            taker = _name(_parsed(self._path.read_bytes()))
            raise LockLostError(
                f"{taker} has taken over {self._path.parent}; this process was silent for more "
                f"than {SILENT_SEC:.0f} s and ends here, without another write."
            )
        return self._path.parent

    def _follow(self) -> None:
        """Finds the locked file again if its folder was renamed."""
        if self._lock is None or _is_open_as(self._path, self._lock):
            return
        found = _open_path(self._lock.descriptor)
        if found is not None and found.name == LOCK and _is_open_as(found, self._lock):
            before, self._path = self._path, found
            _log.warning(f"{before.parent} is now {found.parent}; the run goes on there.")

    def _create_again(self) -> None:
        folder = self._path.parent
        if not folder.is_dir():
            _log.warning(f"{folder} was deleted; the run creates it again and goes on.")
        folder.mkdir(exist_ok=True)
        with self._changing:
            self._release()
            try:
                self._lock = self._take()
            except ConfigError as error:
                raise LockLostError(str(error)) from error

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _let_go(self) -> None:
        """Removes the file if this process holds it; a thread of `EarlyStop` may call this."""
        self._stop.set()
        free = self._changing.acquire(timeout=_FAREWELL_SEC)
        try:
            with contextlib.suppress(OSError):  # A folder that is gone holds no lock.
                self._follow()
                if self._lock is not None and self._is_ours():
                    self._path.unlink()
        finally:
            if free:
                self._changing.release()

    def _take(self) -> FileLock:
        self._check_running()
        lock = self._open()
        try:
            if holder := _parsed(lock.read().encode()):
                self._check_gone(lock, holder)
                _log.warning(
                    f"LOCK: {_name(holder)} held {self._path} and ended without releasing it; "
                    "this process takes over."
                )
            self._check_running()
            lock.write(self._line(0))
        except BaseException:
            if not lock.read():  # This process has created the file.
                self._path.unlink()
            lock.release()
            raise
        return lock

    def _check_running(self) -> None:
        if self._stop.is_set():
            raise ConfigError(f"workdir={str(self._path.parent)!r}: this process is stopping.")

    def _open(self) -> FileLock:
        while True:
            try:
                lock = FileLock(self._path, required=False)
            except HeldError as error:
                raise self._held(_parsed(error.text.encode())) from None
            # The earlier holder may remove the file between our opening and our locking.
            if _is_open_as(self._path, lock):
                return lock
            lock.release()

    def _check_gone(self, lock: FileLock, holder: dict[str, Any]) -> None:
        if holder.get("boot") == self._me["boot"]:
            if not lock.works and _is_alive(holder):
                raise self._held(holder)
            return
        _log.warning(
            f"LOCK: {_name(holder)} holds {self._path}; watching it for {SILENT_SEC:.0f} s to see "
            "whether it is alive."
        )
        deadline = time.monotonic() + SILENT_SEC
        while time.monotonic() < deadline and not self._stop.wait(min(1.0, SILENT_SEC / 10)):
            now = _parsed(lock.read().encode())
            if now != holder:
                raise self._held(now or holder)

    def _held(self, holder: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"workdir={str(self._path.parent)!r} is in use by {_name(holder)}; wait for it, stop "
            "it, or choose another --workdir."
        )

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SEC):
            count += 1
            # A full or missing disk also stops the writing of results, and that code reports it.
            with contextlib.suppress(OSError), self._changing:
                self._follow()
                if self._lock is not None and self._is_ours():
                    self._lock.write(self._line(count))

    def _is_ours(self) -> bool:
        holder = _parsed(self._path.read_bytes())
        return {**holder, "count": 0} == {**self._me, "count": 0}

    def _line(self, count: int) -> str:
        return json.dumps({**self._me, "count": count})


def _is_open_as(path: Path, lock: FileLock) -> bool:
    """Returns whether `path` names the file that this process has locked."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(lock.descriptor))
    except OSError:
        return False


def _open_path(descriptor: int) -> Path | None:
    """Returns the present path of an open file; None if the system does not tell it."""
    with contextlib.suppress(OSError):
        if hasattr(fcntl, "F_GETPATH"):  # macOS
            return Path(
                os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
            )
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    return None


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),  # Only for messages.
        "command": shlex.join(sys.orig_argv),
    }


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that has not written its name yet"
    return (
        f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('since')} as "
        f"`{holder.get('command')}`"
    )


def _parsed(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(strict_json.JsonError):
        found = strict_json.parse(content)
        if isinstance(found, dict):
            return found
    return {}


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _started(pid: int) -> str:
    """Returns the start time of a process in kernel ticks, or ""; the kernel reuses pids."""
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
