"""Tests peers that are threads with real sockets; tests/faults/test_peers.py has processes."""

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
_WAIT_SEC = 60  # the machine may be busy


class Run:
    """The processes of a run, and how each of them ended."""

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
        """Starts `count` processes without the last `missing`."""
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
        each._loop.close()


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_SEC
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_living_processes_are_left_alone(run: Run) -> None:
    for _ in range(3):
        for peers in run.all or run.together(3, timeout_sec=6):
            assert peers.explain() is None
    assert not run.ends


def test_all_hear_at_once_which_process_was_killed(run: Run) -> None:
    # The limit is longer than the test, so that silence is not the reason.
    run.together(3, timeout_sec=100 * _WAIT_SEC)
    hub, _, victim = run.all
    until(lambda: len(hub._members) == 2)
    victim._socket.shutdown(socket.SHUT_RDWR)  # as the kernel does
    until(lambda: {0, 1} <= set(run.ends))
    for own in (0, 1):
        code, text = run.ends[own]
        assert code == 75
        assert text.startswith(
            f"PEERS: process 2 on host {HOST} (pid {PID}) is gone: it ended without a message, or "
            "was "
            "killed.\n"
            f"This is process {own} on host {HOST} (pid {PID}). It ends now with exit code 75. "
            "Start all processes again"
        )


def test_all_hear_which_process_is_silent(run: Run) -> None:
    run.together(3, timeout_sec=2, missing=1)
    run.connect(run.hello(2))
    until(lambda: len(run.ends) == 2)
    for own in (0, 1):
        code, text = run.ends[own]
        assert code == 75
        assert text.startswith(
            "PEERS: process 2 on host far (pid 7) is gone: it sent nothing for 2 s (--peer_timeout)"
        )


def test_a_process_that_never_connects_is_named(run: Run) -> None:
    run.together(2, timeout_sec=1, missing=1)
    until(lambda: bool(run.ends))
    assert run.ends[0][1].startswith("PEERS: process 1 on an unknown host is gone: it sent")


def test_silent_process_0_is_named(run: Run) -> None:
    with socket.create_server(("localhost", 0)) as server:
        member = run.make(1, 2, 1)
        member.connect("localhost", server.getsockname()[1], "token")
        member.start()
        run.raw.append(server.accept()[0])
        answer = json.dumps({"hello": [0, "far", 7]}) + "\n"
        run.raw[0].sendall(answer.encode())
        until(lambda: bool(run.ends))
        assert run.ends[1][1].startswith("PEERS: process 0 on host far (pid 7) is gone: it sent")


def test_a_process_that_was_paused_blames_no_other(run: Run) -> None:
    hub, *_ = run.together(3, timeout_sec=12)
    hub._timeout_sec = 3  # the other processes could give it up
    assert hub.explain() is None
    hub._loop.call_soon_threadsafe(time.sleep, 4)  # its thread is blocked, as under SIGSTOP
    time.sleep(4)
    assert hub.explain() is None
    assert not run.ends


def test_a_process_that_was_given_up_hears_it(run: Run) -> None:
    run.together(2, timeout_sec=1, missing=1)
    silent = run.connect(run.hello(1))
    until(lambda: bool(run.ends))
    said = silent.makefile("rb")
    gone = next(m for m in map(json.loads, said) if "gone" in m)
    assert gone["gone"] == 1
    member = run.make(1, 2, 30)
    member._be_told(gone["gone"], gone["why"])
    assert "the other processes have ended, because this process seemed dead" in run.ends[1][1]


def test_a_parting_message_ends_no_other_process(run: Run) -> None:
    hub, first, second = run.together(3, timeout_sec=6)
    first.leave("done")
    assert hub.explain() is None and second.explain() is None
    hub.leave("done")
    until(lambda: not second._heard)
    assert second.explain() is None
    assert not run.ends


def test_waiting_processes_hear_of_a_failure(run: Run) -> None:
    hub, first, second = run.together(3, timeout_sec=2)
    assert hub.explain() is None
    first.leave("failed", "TypeError: of process 1")
    until(lambda: {0, 2} <= set(run.ends))
    text = f"process 1 on host {HOST} (pid {PID}) failed; see its log: TypeError: of process 1"
    for own, peers in ((0, hub), (2, second)):
        assert run.ends[own] == (1, run.ends[own][1])
        assert run.ends[own][1].startswith(f"PEERS: {text}")
        assert peers.explain() == f"PEERS: {text}"


def test_a_process_that_stops_makes_all_stop(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    hub, first, _ = run.together(3, timeout_sec=2)
    assert hub.explain() is None
    first.leave("stopped", "SIGTERM")
    until(lambda: {0, 2} <= set(run.ends))  # after the time limit
    assert sent == [(PID, signal.SIGTERM)] * 2
    for own in (0, 2):
        code, text = run.ends[own]
        assert code == 75 and "(pid" in text and "stopped: SIGTERM." in text


STRANGERS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\x00" * 40_000,
    b'{"hello": [1, "far", 7], "token": "guessed"}\n',
    b'{"hello": [1, "far", 7]}\n',
    b'{"beat": 0}\n',
    b'{"left": [1, "far", 7], "how": "failed", "why": "x"}\n',
    b"[1, 2]\n",
    b"[" * 10_000 + b"\n",
    b"",
]


def test_strangers_are_ignored(run: Run) -> None:
    hub, *_ = run.together(2, timeout_sec=6, missing=1)
    for first in STRANGERS:
        stranger, said = run.connect(b""), b""
        with contextlib.suppress(OSError):  # process 0 may close the connection at any moment
            stranger.sendall(first)
            stranger.shutdown(socket.SHUT_WR)
            said = stranger.recv(1)
        assert not said, first
    member = run.make(1, 2, 6)
    member.connect("localhost", run.port, run.token)
    member.start()
    assert hub.explain() is None and member.explain() is None
    # A second connection cannot take the number of a connected process.
    assert not run.connect(run.hello(1)).recv(1)
    assert hub.explain() is None and not run.ends


def test_process_0_that_cannot_be_reached(run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        with pytest.raises(OSError):
            run.make(1, 2, 1).connect("localhost", unused.getsockname()[1], "token")


ABORTED = """
import ctypes, threading, time
from mobilellm_jax.processes.jax_private import delay_aborts
from mobilellm_jax.processes.peers import end_at_once

delay_aborts()
threading.Thread(target=ctypes.CDLL(None).abort).start()
time.sleep(0.5)
end_at_once(75, "named")
"""


def test_an_abort_in_c_leaves_time_for_a_message() -> None:
    process = subprocess.run([sys.executable, "-c", ABORTED], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (75, "\nnamed\n")


def test_no_thread_is_left(run: Run) -> None:
    before = threading.active_count()
    both = run.together(2, timeout_sec=1)
    assert threading.active_count() == before + 2
    for peers in both:
        peers.leave("done")
    until(lambda: threading.active_count() == before)
