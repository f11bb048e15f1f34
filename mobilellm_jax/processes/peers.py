"""Watches the processes of a run, and names a process that is gone.

When a process dies or hangs, the others wait in a collective, or jax aborts them without a name. So
every process keeps a connection to process 0, and both ends send a short message (a beat) in equal
intervals. Process 0 tells the others which process is gone. A process whose connection closes
without a parting message is gone at once. A process that sends nothing for `timeout_sec` is gone as
well. No wall clock is used. `distributed.py` decides where process 0 listens.
"""

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

_BEATS = 12  # in `timeout_sec`
_LONGEST_BEAT_SEC = 5.0
_LOOK_SEC = 0.5  # longest time until the thread sees that `leave` was called
_PARTING_SEC = 2.0  # a leaving process waits so long for the others to read its message
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
    """Ends this process from any thread; a file that is being written keeps no final name."""
    os.write(2, f"\n{text}\n".encode())
    os._exit(code)


@dataclasses.dataclass
class _Link:
    """A connection, with the bytes that are not parsed or not sent yet."""

    connection: socket.socket
    process: int | None = None  # number of the other process, once its greeting has come
    incoming: bytes = b""
    outgoing: bytes = b""

    def send(self, message: dict[str, Any]) -> None:
        """Sends the bytes that fit now; the rest goes with the next message."""
        if len(self.outgoing) < _MAX_BYTES:  # otherwise the other process reads too slowly
            self.outgoing += json.dumps(message).encode() + b"\n"
        try:
            sent = self.connection.send(self.outgoing)
        except OSError:  # the buffer is full, or `receive` will see that the socket is closed
            return
        self.outgoing = self.outgoing[sent:]

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the received messages, or None if the socket closed or a message is invalid."""
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
    """Watches the other processes in a thread, from `start` until `leave`.

    Args:
      own: number of this process.
      count: number of processes of the run.
      timeout_sec: a process that is silent for so long counts as gone.
      end: ends this process with an exit code and a message, when another process is gone.
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
        self._heard: dict[int, float] = {}  # process -> time of its last message; no parted ones
        self._all_heard = 0.0  # a time after which every process was heard, as process 0 says
        self._ends_at: float | None = None
        self._ending = (FAILED, "")
        self._left = False
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def listen(self) -> tuple[int, str]:
        """Accepts connections in process 0; returns the port and the secret of a greeting."""
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
          OSError: if this process cannot reach process 0.
        """
        connection = socket.create_connection((host, port), self._timeout_sec)
        connection.setblocking(False)
        self._heard, self._members = {0: time.monotonic()}, {0: Member(0, host, 0)}
        link = self._add(connection)
        link.process = 0
        link.send({"hello": self._me, "token": token})

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def leave(self, how: Parting, why: str = "") -> None:
        """Sends the parting message: done, stopped (the run resumes later) or failed."""
        with self._lock:
            if self._left:
                return
            self._left = True
            self._send_all(_parting(self._me, how, why))
            waiting = [link.connection for link in self._links if link.process is not None]
        # The other side closes the connection when it has read the message. The kernel may discard
        # the message if this side closes first.
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
        """Returns what happened to another process, or None if all of them are alive.

        The call waits for a new message of every process. If a process sends no message, it counts
        as lost, and this process ends as well.
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
                    # This process itself was paused, and has not read the messages of the others.
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
        assert self._listener is not None, "only process 0 listens"
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the other side has closed the connection already
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
                self._drop(link)  # the sender is not a process of the run
                return
            assert link.process is not None, "the greeting has set the number"
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
                self._lose(link.process, "it ended without a message, or was killed")

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
        """Records that a process leaves; process 0 tells the others."""
        self._heard.pop(who.process, None)
        if link.process == who.process:
            self._drop(link)
        if how == "done":
            return
        self._send_all(_parting(who, how, why))
        if self._ends_at is not None:
            return
        # This process may finish its work alone. A collective without the other process never ends.
        self._ends_at = time.monotonic() + self._timeout_sec
        if how == "stopped":
            self._ending = SAVED_REQUEUE_ME, f"PEERS: {who} stopped: {why}."
            os.kill(os.getpid(), signal.SIGTERM)  # stop this process as well
        else:
            self._ending = FAILED, f"PEERS: {who} failed; see its log: {why}"

    def _judge(self, now: float) -> None:
        for process, heard in list(self._heard.items()):
            if now - heard > self._timeout_sec:
                silence = f"it sent nothing for {self._timeout_sec:g} s (--peer_timeout)"
                self._lose(process, silence)
        if self._ends_at is not None and now >= self._ends_at:
            self._finish(*self._ending)

    def _lose(self, process: int, why: str) -> None:
        who = self._members.get(process, f"process {process} on an unknown host")
        text = f"{who} is gone: {why}."
        self._send_all({"gone": process, "why": text})
        self._finish(SAVED_REQUEUE_ME, f"PEERS: {text}")

    def _be_told(self, process: int, text: str) -> None:
        if process == self._me.process:
            text = f"the other processes gave up this process, because it seemed dead: {text}"
        self._finish(SAVED_REQUEUE_ME, f"PEERS: {text}")

    def _finish(self, code: int, text: str) -> None:
        self._ends_at, self._ending = time.monotonic(), (code, text)
        then = "The log of that process may give the reason."
        if code == SAVED_REQUEUE_ME:
            then = "Start all processes again: the run resumes from its last complete checkpoint."
        self._end(code, f"{text}\nThis is {self._me}. It ends now with exit code {code}. {then}")


def _parting(who: Member, how: Parting, why: str) -> dict[str, Any]:
    return {"left": who, "how": how, "why": why[:_MAX_WHY]}
