"""Signs of life between the processes of a run, so that one that is gone is named and not awaited.

A process that dies or hangs leaves the others waiting in a collective, or has them aborted by jax
without a name. So every process holds a connection to process 0, over which both count up, and
process 0 tells all others who is gone: one whose connection closes without a good-bye, at once, and
one that is silent for the time that the run allows. Nobody's wall clock is asked.

Here are sockets and one thread only; `distributed.py` says who listens where.
"""

import ctypes
import dataclasses
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from mobilellm_jax.errors import FAILED, SAVED_REQUEUE_ME
from mobilellm_jax.storage import strict_json

_BEATS = 12  # in the time after which a process that gives none counts as gone
_LONGEST_BEAT_SEC = 5.0
_LOOK_SEC = 0.5  # at the latest after which the thread sees that it is over
_PARTING_SEC = 2.0  # that a process which leaves waits for the others to have read so
_MAX_BYTES = 1 << 14  # of a message
_MAX_WHY = 2000  # characters

Parting = Literal["done", "stopped", "failed"]


class Member(NamedTuple):
    """A process of the run, as messages name it."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host} (pid {self.pid})"


def end_at_once(code: int, text: str) -> None:
    """Ends this process from any thread; what it was writing is as after a kill: not there."""
    os.write(2, f"\n{text}\n".encode())
    os._exit(code)


@dataclasses.dataclass
class _Link:
    """A connection, with what has not been read and written yet."""

    connection: socket.socket
    process: int | None = None  # not known before the other side has said so
    incoming: bytes = b""
    outgoing: bytes = b""

    def send(self, message: dict[str, Any]) -> None:
        """Sends as much as the other side takes now, and the rest with the next message."""
        if len(self.outgoing) < _MAX_BYTES:  # else it has not read for long
            self.outgoing += json.dumps(message).encode() + b"\n"
        try:
            sent = self.connection.send(self.outgoing)
        except OSError:  # full, or closed, which the reader of the same socket hears of
            return
        self.outgoing = self.outgoing[sent:]

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the messages that are there; None if the other side has closed, or talks rot."""
        try:
            received = self.connection.recv(_MAX_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self.incoming = (self.incoming + received).split(b"\n")
        if not received or len(self.incoming) > _MAX_BYTES:
            return None
        try:
            messages = [strict_json.parse(line) for line in lines]
        except strict_json.JsonError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None


class Peers:
    """The other processes, watched by a thread from `start` to `leave`.

    Args:
      own: number of this process.
      count: of the run's processes.
      timeout_sec: silence after which a process counts as gone.
      end: how this process ends when another is gone: exit code, and what to say before.
    """

    def __init__(
        self,
        own: int,
        count: int,
        timeout_sec: float,
        end: Callable[[int, str], None] = end_at_once,
    ) -> None:
        self._me = Member(own, socket.gethostname(), os.getpid())
        self._count, self._timeout_sec, self._end = count, timeout_sec, end
        self._beat_sec = min(_LONGEST_BEAT_SEC, timeout_sec / _BEATS)
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._token = secrets.token_hex(16)
        self._links: list[_Link] = []
        self._members: dict[int, Member] = {}
        self._heard: dict[int, float] = {}  # process -> when, of those that have not left
        self._all_heard = 0.0  # when the last of them was heard, as far as is known here
        self._ends_at: float | None = None
        self._ending = (FAILED, "")
        self._left = False
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def listen(self) -> tuple[int, str]:
        """Takes connections, as process 0 does; returns the port, and what to say there first."""
        if socket.has_dualstack_ipv6():
            self._listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True
            )
        else:
            self._listener = socket.create_server(("", 0))
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._heard = dict.fromkeys(range(1, self._count), time.monotonic())
        return int(self._listener.getsockname()[1]), self._token

    def connect(self, host: str, port: int, token: str) -> None:
        """Connects to process 0.

        Raises:
          OSError: if that cannot be reached.
        """
        connection = socket.create_connection((host, port), self._timeout_sec)
        connection.setblocking(False)
        self._heard, self._members = {0: time.monotonic()}, {0: Member(0, host, 0)}
        link = self._add(connection)
        link.process = 0
        link.send({"hello": self._me, "token": token})

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def leave(self, how: Parting, why: str = "") -> None:
        """Says good-bye: done, stopped (the run goes on when started again) or failed."""
        with self._lock:
            if self._left:
                return
            self._left = True
            self._send_all(_parting(self._me, how, why))
            waiting = [link.connection for link in self._links if link.process is not None]
        # The other side closes when it has read that. If this side went first, with something
        # unread, the kernel might throw it away.
        deadline = time.monotonic() + _PARTING_SEC
        for connection in waiting:
            try:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                while connection.recv(_MAX_BYTES):
                    pass
            except OSError:
                continue
        for link in self._links:
            link.connection.close()
        if self._listener is not None:
            self._listener.close()

    def explain(self) -> str | None:
        """Returns what is wrong with another process, after an error that may have come from there.

        It waits until every one has given a sign of life. One that gives none is gone, and ends
        this process too.
        """
        began = time.monotonic()
        while time.monotonic() < began + 2 * self._timeout_sec:
            with self._lock:
                if self._ends_at is not None:
                    return self._ending[1]
                heard = (
                    self._all_heard if self._me.process else min(self._heard.values(), default=0)
                )
                if heard > began or not self._heard:
                    return None
            time.sleep(min(0.05, self._beat_sec))
        return None

    def _watch(self) -> None:
        woke = time.monotonic()
        next_beat = 0.0
        while True:
            ready = self._selector.select(min(_LOOK_SEC, max(0.0, next_beat - time.monotonic())))
            with self._lock:
                if self._left:
                    self._selector.close()
                    return
                now = time.monotonic()
                if now - woke > self._timeout_sec / 2:
                    # This process was stopped itself: the others' signs lie here unread.
                    self._heard = dict.fromkeys(self._heard, now)
                woke = now
                for key, _ in ready:
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.data)
                self._judge(now)
                if now >= next_beat:
                    next_beat = now + self._beat_sec
                    oldest = now - min(self._heard.values(), default=now)
                    self._send_all({"beat": oldest})

    def _send_all(self, message: dict[str, Any]) -> None:
        for link in self._links:
            if link.process is not None:
                link.send(message)

    def _accept(self) -> None:
        assert self._listener is not None, "only who listens accepts"
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        connection.setblocking(False)
        self._add(connection)

    def _add(self, connection: socket.socket) -> _Link:
        link = _Link(connection)
        self._links.append(link)
        self._selector.register(connection, selectors.EVENT_READ, link)
        return link

    def _drop(self, link: _Link) -> None:
        self._selector.unregister(link.connection)
        self._links.remove(link)
        link.connection.close()

    def _read(self, link: _Link) -> None:
        messages = link.receive()
        for message in messages or ():
            if link.process is None and not self._is_greeting(link, message):
                self._drop(link)  # somebody else's
                return
            assert link.process is not None, "it has just said who it is"
            now = time.monotonic()
            self._heard[link.process] = now
            if "hello" in message:
                self._members[link.process] = Member(*message["hello"])
                if self._me.process == 0:
                    link.send({"hello": self._me})
            elif "beat" in message:
                self._all_heard = now - float(message["beat"])
            elif "gone" in message:
                self._be_told(int(message["gone"]), str(message["why"]))
            elif "left" in message:
                self._part(link, Member(*message["left"]), message["how"], message["why"])
                if link not in self._links:
                    return
        if messages is None:
            self._drop(link)
            if link.process in self._heard:
                self._lose(link.process, "it ended without a word, or was killed")

    def _is_greeting(self, link: _Link, message: dict[str, Any]) -> bool:
        match message:
            case {"token": str(token), "hello": [int(process), str(), int()]} if (
                hmac.compare_digest(token, self._token)
                and process in self._heard
                and process not in self._members
            ):
                link.process = process
                return True
        return False

    def _part(self, link: _Link, who: Member, how: Parting, why: str) -> None:
        """Takes note that a process leaves; process 0 passes it on."""
        self._heard.pop(who.process, None)
        if link.process == who.process:
            self._drop(link)
        if how == "done":
            return
        self._send_all(_parting(who, how, why))
        if self._ends_at is not None:
            return
        # It, or what it waits for, may end by itself; a collective without the other never does.
        self._ends_at = time.monotonic() + self._timeout_sec
        if how == "stopped":
            self._ending = SAVED_REQUEUE_ME, f"PEERS: {who} stopped: {why}."
            os.kill(os.getpid(), signal.SIGTERM)  # as if this process had been asked
        else:
            self._ending = FAILED, f"PEERS: {who} failed, see its log: {why}"

    def _judge(self, now: float) -> None:
        for process, heard in list(self._heard.items()):
            if now - heard > self._timeout_sec:
                silence = f"no sign of life for {self._timeout_sec:g} s (--peer_timeout)"
                self._lose(process, silence)
        if self._ends_at is not None and now >= self._ends_at:
            self._finish(*self._ending)

    def _lose(self, process: int, why: str) -> None:
        who = self._members.get(process, f"process {process}, whose host is not known yet,")
        text = f"{who} is gone: {why}."
        self._send_all({"gone": process, "why": text})
        self._finish(SAVED_REQUEUE_ME, f"PEERS: {text}")

    def _be_told(self, process: int, text: str) -> None:
        if process == self._me.process:
            text = f"the others went without this process, which seemed dead to them: {text}"
        self._finish(SAVED_REQUEUE_ME, f"PEERS: {text}")

    def _finish(self, code: int, text: str) -> None:
        self._ends_at, self._ending = time.monotonic(), (code, text)
        then = "Its log may say why."
        if code == SAVED_REQUEUE_ME:
            then = "Start all processes again: the run goes on from its last complete checkpoint."
        self._end(code, f"{text}\nThis is {self._me}, and ends with exit code {code}. {then}")


def delay_aborts() -> None:
    """Gives `Peers` a few seconds to name who is gone before jax aborts this process.

    jax's client aborts as soon as process 0 does not answer, from a thread in C that no Python code
    gets in the way of (its `missed_heartbeat_callback` ends in `std::bad_cast`, jax 0.10.2). So
    SIGABRT is handled by libc's own `sleep`, which POSIX allows there: the thread that aborts waits
    for as many seconds as the signal's number is, 6, and then goes on to end the process.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _parting(who: Member, how: Parting, why: str) -> dict[str, Any]:
    return {"left": who, "how": how, "why": why[:_MAX_WHY]}
