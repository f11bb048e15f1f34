"""Processes that are threads here, over real sockets; real ones are in faults/test_peers.py."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mobilellm_jax.processes.peers import Peers

HOST, PID = socket.gethostname(), os.getpid()
_WAIT_SEC = 60  # for a machine that does other things


class Run:
    """Processes of a run that watch each other, and how each of them ended."""

    def __init__(self) -> None:
        self.all: list[Peers] = []
        self.ends: dict[int, tuple[int, str]] = {}
        self.raw: list[socket.socket] = []

    def make(self, own: int, count: int, timeout_sec: float) -> Peers:
        def end(code: int, text: str) -> None:
            self.ends.setdefault(own, (code, text))

        self.all.append(Peers(own, count, timeout_sec, end))
        return self.all[-1]

    def together(self, count: int, timeout_sec: float, missing: int = 0) -> list[Peers]:
        """Starts so many processes, but the last few, which the others wait for."""
        hub = self.make(0, count, timeout_sec)
        self.port, self.token = hub.listen()
        for own in range(1, count - missing):
            self.make(own, count, timeout_sec).connect("localhost", self.port, self.token)
        for each in self.all:
            each.start()
        return self.all

    def connect(self, first: bytes) -> socket.socket:
        self.raw.append(socket.create_connection(("localhost", self.port), _WAIT_SEC))
        self.raw[-1].sendall(first)
        return self.raw[-1]

    def hello(self, own: int, **more: Any) -> bytes:
        return json.dumps({"hello": [own, "far", 7], "token": self.token, **more}).encode() + b"\n"


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run()
    yield made
    for connection in made.raw:
        connection.close()
    for each in made.all[::-1]:
        each.leave("done")
        each._thread.join(_WAIT_SEC) if each._thread.ident else each._selector.close()


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_SEC
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_lives_is_left_alone(run: Run) -> None:
    # Each answer takes a sign of life of every process that came after the question.
    for _ in range(3):
        for peers in run.all or run.together(3, timeout_sec=6):
            assert peers.explain() is None
    assert not run.ends


def test_who_is_killed_is_named_to_all_at_once(run: Run) -> None:
    # Longer than the test may take, so that it is not the silence that is noticed.
    run.together(3, timeout_sec=100 * _WAIT_SEC)
    hub, _, victim = run.all
    until(lambda: len(hub._members) == 2)
    with victim._lock:
        victim._links[0].connection.shutdown(socket.SHUT_RDWR)  # as the kernel does
        until(lambda: {0, 1} <= set(run.ends))
    for own in (0, 1):
        code, text = run.ends[own]
        assert code == 75
        assert text.startswith(
            f"PEERS: process 2 on host {HOST} (pid {PID}) is gone: it ended without a word, or was "
            "killed.\n"
            f"This is process {own} on host {HOST} (pid {PID}), and ends with exit code 75. "
            "Start all processes again"
        )


def test_who_is_silent_is_named_to_all(run: Run) -> None:
    run.together(3, timeout_sec=2, missing=1)
    run.connect(run.hello(2))
    until(lambda: len(run.ends) == 2)
    for own in (0, 1):
        code, text = run.ends[own]
        assert code == 75
        assert text.startswith(
            "PEERS: process 2 on host far (pid 7) is gone: no sign of life for 2 s (--peer_timeout)"
        )


def test_who_never_comes_is_named(run: Run) -> None:
    run.together(2, timeout_sec=1, missing=1)
    until(lambda: bool(run.ends))
    assert run.ends[0][1].startswith("PEERS: process 1, whose host is not known yet, is gone: no")


def test_silent_process_0_is_named(run: Run) -> None:
    with socket.create_server(("localhost", 0)) as server:
        member = run.make(1, 2, 1)
        member.connect("localhost", server.getsockname()[1], "token")
        member.start()
        run.raw.append(server.accept()[0])
        answer = json.dumps({"hello": [0, "far", 7]}) + "\n"
        run.raw[0].sendall(answer.encode())
        until(lambda: bool(run.ends))
        assert run.ends[1][1].startswith("PEERS: process 0 on host far (pid 7) is gone: no sign of")


def test_process_that_was_stopped_itself_accuses_nobody(run: Run) -> None:
    hub, *_ = run.together(3, timeout_sec=12)
    hub._timeout_sec = 3  # the others would have a right to give it up
    assert hub.explain() is None
    with hub._lock:  # its thread does nothing, as under SIGSTOP
        time.sleep(4)
    assert hub.explain() is None
    assert not run.ends


def test_given_up_process_is_told_so(run: Run) -> None:
    run.together(2, timeout_sec=1, missing=1)
    silent = run.connect(run.hello(1))
    until(lambda: bool(run.ends))
    said = silent.makefile("rb")
    gone = next(m for m in map(json.loads, said) if "gone" in m)
    assert gone["gone"] == 1
    member = run.make(1, 2, 30)
    member._be_told(gone["gone"], gone["why"])
    assert "the others went without this process, which seemed dead" in run.ends[1][1]


def test_good_bye_ends_nobody(run: Run) -> None:
    hub, first, second = run.together(3, timeout_sec=6)
    first.leave("done")
    assert hub.explain() is None and second.explain() is None
    hub.leave("done")
    until(lambda: not second._heard)
    assert second.explain() is None
    assert not run.ends


def test_failure_is_told_to_those_who_wait(run: Run) -> None:
    hub, first, second = run.together(3, timeout_sec=2)
    assert hub.explain() is None
    first.leave("failed", "TypeError: of process 1")
    until(lambda: {0, 2} <= set(run.ends))
    text = f"process 1 on host {HOST} (pid {PID}) failed, see its log: TypeError: of process 1"
    for own, peers in ((0, hub), (2, second)):
        assert run.ends[own] == (1, run.ends[own][1])
        assert run.ends[own][1].startswith(f"PEERS: {text}")
        assert peers.explain() == f"PEERS: {text}"


def test_one_that_is_asked_to_stop_stops_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    hub, first, _ = run.together(3, timeout_sec=2)
    assert hub.explain() is None
    first.leave("stopped", "SIGTERM")
    until(lambda: {0, 2} <= set(run.ends))  # whoever does not go by itself
    assert sent == [(PID, signal.SIGTERM)] * 2
    for own in (0, 2):
        code, text = run.ends[own]
        assert code == 75 and "(pid" in text and "stopped: SIGTERM." in text


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\x00" * 40_000,
        b'{"hello": [1, "far", 7], "token": "guessed"}\n',
        b'{"hello": [1, "far", 7]}\n',
        b'{"beat": 0}\n',
        b'{"left": [1, "far", 7], "how": "failed", "why": "x"}\n',
        b"[1, 2]\n",
        b"[" * 10_000 + b"\n",
        b"",
    ],
)
def test_strangers_are_not_listened_to(first: bytes, run: Run) -> None:
    hub, *_ = run.together(2, timeout_sec=6, missing=1)
    stranger, said = run.connect(b""), b""
    with contextlib.suppress(OSError):  # process 0 may hang up at any moment
        stranger.sendall(first)
        stranger.shutdown(socket.SHUT_WR)
        said = stranger.recv(1)
    assert not said
    member = run.make(1, 2, 6)
    member.connect("localhost", run.port, run.token)
    member.start()
    assert hub.explain() is None and member.explain() is None
    # Nobody takes the place of one that is there.
    assert not run.connect(run.hello(1)).recv(1)
    assert hub.explain() is None and not run.ends


def test_process_0_that_cannot_be_reached(run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        with pytest.raises(OSError):
            run.make(1, 2, 1).connect("localhost", unused.getsockname()[1], "token")


ABORTED = """
import ctypes, threading, time
from mobilellm_jax.processes.peers import delay_aborts, end_at_once

delay_aborts()
threading.Thread(target=ctypes.CDLL(None).abort).start()
time.sleep(0.5)
end_at_once(75, "named")
"""


def test_abort_from_c_leaves_time_to_say_why() -> None:
    process = subprocess.run([sys.executable, "-c", ABORTED], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (75, "\nnamed\n")


def test_no_thread_is_left(run: Run) -> None:
    before = threading.active_count()
    for peers in run.together(2, timeout_sec=1):
        peers.leave("done")
    until(lambda: threading.active_count() == before)
