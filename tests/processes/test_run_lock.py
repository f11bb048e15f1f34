"""One run per folder; the locks of other hosts are written by hand."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mobilellm_jax.config import ConfigError
from mobilellm_jax.processes import run_lock
from mobilellm_jax.processes.early_stop import FAREWELLS
from mobilellm_jax.processes.run_lock import LOCK, LockLostError, RunLock

HOLD = """
import sys, time
from pathlib import Path
from mobilellm_jax.processes.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
ELSEWHERE = {
    "host": "node7",
    "boot": "another start of another machine",
    "pid": 4711,
    "started": "1",
    "since": "2026-01-02 03:04:05 +0000",
    "command": "mobilellm train --config=a.py",
    "count": 3,
}


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SILENT_SEC", 1.0)


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def write(folder: Path, holder: dict[str, Any]) -> None:
    (folder / LOCK).write_text(json.dumps(holder))


def test_second_run_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(ConfigError) as error, RunLock(tmp_path):
            pass
    finally:
        end(process)
    message = str(error.value)
    assert f"workdir={str(tmp_path)!r} is in use by process {process.pid} on " in message
    for part in (os.uname().nodename, "started 20", "RunLock(Path(sys.argv[1]))", "--workdir"):
        assert part in message


def test_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ConfigError, match="is in use"), RunLock(tmp_path):
        pass


def test_lock_of_a_dead_process_is_taken_over_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = hold(tmp_path)
    end(process)
    with RunLock(tmp_path):
        pass
    (line,) = caplog.messages
    assert f"process {process.pid} on " in line and "takes over" in line


def test_nothing_is_left_behind_and_nothing_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with RunLock(tmp_path):
            assert (tmp_path / LOCK).exists()
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == [] and caplog.messages == []


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_process_is_looked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunLock(tmp_path):
        holder = json.loads((tmp_path / LOCK).read_text())
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on"):
            RunLock(tmp_path).__enter__()
    # The kernel may have given the pid to another process.
    write(tmp_path, holder | {"started": "1"})
    with RunLock(tmp_path):
        assert "takes over" in caplog.messages[0]


@pytest.mark.usefixtures("soon")
def test_silent_holder_on_another_host_counts_as_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, ELSEWHERE)
    with RunLock(tmp_path) as lock:
        assert lock.folder() == tmp_path
    watching, takes_over = caplog.messages
    assert "process 4711 on node7" in watching and "watching" in watching
    assert "takes over" in takes_over


def test_holder_on_another_host_that_counts_is_alive(tmp_path: Path) -> None:
    write(tmp_path, ELSEWHERE)
    stop = threading.Event()

    def count() -> None:
        number = 3
        while not stop.wait(0.05):
            number += 1
            with (tmp_path / LOCK).open("r+") as file:
                file.write(json.dumps(ELSEWHERE | {"count": number}))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"in use by process 4711 on node7, started 2026-01"):
            RunLock(tmp_path).__enter__()
    finally:
        stop.set()
        thread.join()


def test_holder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SEC", 0.01)
    with RunLock(tmp_path):
        deadline = time.monotonic() + 60
        while json.loads((tmp_path / LOCK).read_text() or "{}").get("count", 0) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_run_that_slept_through_a_takeover_writes_no_more(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        assert lock.folder() == tmp_path
        write(tmp_path, ELSEWHERE)
        with pytest.raises(LockLostError, match="process 4711 on node7"):
            lock.folder()
    assert json.loads((tmp_path / LOCK).read_text()) == ELSEWHERE


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0", '{"pid": "x"}'])
def test_content_that_no_run_wrote_stops_nobody(content: str, tmp_path: Path, soon: None) -> None:
    del soon
    (tmp_path / LOCK).write_text(content)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_stop_at_any_moment_leaves_no_lock_and_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGTERM may arrive between any two lines that take the lock."""

    def enter_and_stop_at(line: int) -> tuple[int, bool]:
        """Returns how many lines ran, and whether the lock's file was left when they had run."""
        count, farewell = 0, threading.Thread(target=FAREWELLS.say)

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal count
            if frame.f_code.co_filename != run_lock.__file__:
                return None
            count += event == "line"
            if count == line and farewell.ident is None:
                farewell.start()
                farewell.join(0.02)  # it has ended, or waits for this thread
            return trace

        sys.settrace(trace)
        try:
            with RunLock(tmp_path):
                sys.settrace(None)
                farewell.join() if farewell.ident else None
                return count, (tmp_path / LOCK).exists()
        except ConfigError as error:
            assert "is stopping" in str(error)
            return count, (tmp_path / LOCK).exists()
        finally:
            sys.settrace(None)

    lines, left = enter_and_stop_at(-1)
    assert lines > 30 and left  # nobody stopped it
    left_at = [line for line in range(1, lines + 1) if enter_and_stop_at(line)[1]]
    # A farewell that comes before the lock is registered finds nothing to release.
    assert left_at == list(range(1, len(left_at) + 1)) and len(left_at) < lines / 2
    assert list(tmp_path.iterdir()) == [] and caplog.messages == []
