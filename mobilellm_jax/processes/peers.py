"""Watches the processes of a run, and ends them if one is gone; the message names it.

When a process dies or hangs, the others wait in a collective, or jax aborts them without naming it.
So every process keeps a connection to process 0, and both ends send a short message (a beat) in
equal intervals. Process 0 tells the others which process is gone. A process is considered gone if
its connection closes without a last message, or if it sends nothing for `timeout_sec`. All times
are from monotonic clocks.
"""

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from mobilellm_jax.errors import FAILED, SAVED_REQUEUE_ME
from mobilellm_jax.storage import strict_json

_BEATS = 12  # Number of beats per `timeout_sec`.
_LONGEST_BEAT_SEC = 5.0  # Longest time between two beats.
_PARTING_SEC = 2.0  # Longest wait of a leaving process until others read its message.
_MAX_BYTES = 1 << 14  # Largest size of a message.
_MAX_WHY = 2000  # Largest length of a reason in characters.

Parting = Literal["done", "stopped", "failed"]


class Member(NamedTuple):
    """A process of the run, with the facts that name it in messages."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host} (pid {self.pid})"


def end_at_once(code: int, text: str) -> None:
    """Ends this process from any thread; files that are not complete get no final name."""
    try:
        os.write(2, f"\n{text}\n".encode())  # Raises an error if nobody reads the output.
    finally:
        os._exit(code)


class Peers:
    """Watches the other processes in a thread, from the call of `start` to that of `leave`.

    This is process `own` of `count`. If another process is gone, the thread calls `end`.
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
        self._socket: socket.socket | None = None  # Process 0 listens; others connect.
        self._token = secrets.token_hex(16)
        self._writers: dict[int, asyncio.StreamWriter] = {}  # Connection of each process.
        self._talks: set[asyncio.Task[None]] = set()
        self._members: dict[int, Member] = {}
        self._heard: dict[int, float] = {}  # Time of each process's last message.
        self._all_heard = 0.0  # Process 0 got a message from every process after this time.
        self._ends_at: float | None = None
        self._ending = (FAILED, "")
        self._parting: dict[str, Any] = {}  # The last message of this process.
        self._leaving = asyncio.Event()
        self._leave_once = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    def listen(self) -> tuple[int, str]:
        """Accepts connections in process 0; returns the port and the secret for connecting."""
        if socket.has_dualstack_ipv6():
            self._socket = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True
            )
        else:
            self._socket = socket.create_server(("", 0))
        self._heard = dict.fromkeys(range(1, self._count), time.monotonic())
        return int(self._socket.getsockname()[1]), self._token

    def connect(self, host: str, port: int, token: str) -> None:
        """Connects to process 0; raises an `OSError` if that is impossible."""
        self._socket = socket.create_connection((host, port), self._timeout_sec)
        self._socket.sendall(_line({"hello": self._me, "token": token}))
        self._heard, self._members = {0: time.monotonic()}, {0: Member(0, host, 0)}

    def start(self) -> None:
        self._thread.start()

    def leave(self, how: Parting, why: str = "") -> None:
        """Sends the last message of this process; with "stopped", the other processes stop too."""
        with self._leave_once:
            if self._thread.is_alive():
                self._parting = _parting(self._me, how, why)
                # If the thread is just ending, its loop is closed, and nobody hears the message.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._leaving.set)
                self._thread.join()

    def explain(self) -> str | None:
        """Returns a message about a process that is gone, or None if all are alive.

        The method waits for a new message of every process. A process that sends no message counts
        as gone, and its absence also ends this process.
        """
        began = time.monotonic()
        while time.monotonic() < began + 2 * self._timeout_sec:
            if self._ends_at is not None:
                return self._ending[1]
            heard = list(self._heard.values())  # The thread may change the dictionary.
            if not heard or (self._all_heard if self._me.process else min(heard)) > began:
                return None
            time.sleep(min(0.05, self._beat_sec))
        return None

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._watch())
        if self._socket is not None:
            self._socket.close()

    async def _watch(self) -> None:
        assert self._socket is not None, "`listen` or `connect` comes before `start`"
        if self._me.process == 0:
            await asyncio.start_server(self._greet, sock=self._socket, limit=_MAX_BYTES)
        else:
            self._add(0, *await asyncio.open_connection(sock=self._socket, limit=_MAX_BYTES))
        woke = time.monotonic()
        while not self._leaving.is_set():
            now = time.monotonic()
            if now - woke > self._timeout_sec / 2:
                # This process was paused and read no messages. So no process is considered gone.
                self._heard = dict.fromkeys(self._heard, now)
            woke = now
            self._judge(now)
            self._send_all({"beat": now - min(self._heard.values(), default=now)})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), self._beat_sec)
        self._send_all(self._parting)
        # The other process closes the connection after it has read the message. If this process
        # closed the connection first, the kernel could discard the message.
        if self._talks:
            await asyncio.wait(self._talks, timeout=_PARTING_SEC)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Accepts a connection in process 0 if its first message is valid and its number is new."""
        match await _next_message(reader):
            case {"token": str(token), "hello": [int(process), str(host), int(pid)]} if (
                hmac.compare_digest(token, self._token)
                and process in self._heard
                and process not in self._members
            ):
                self._members[process] = Member(process, host, pid)
                self._heard[process] = time.monotonic()
                writer.write(_line({"hello": self._me}))
                self._add(process, reader, writer)
            case _:
                writer.close()

    def _add(
        self, process: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writers[process] = writer
        self._talks.add(asyncio.create_task(self._listen_to(process, reader, writer)))

    async def _listen_to(
        self, process: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.closing(writer):
            while process in self._heard:
                message = await _next_message(reader)
                if message is None:
                    break
                if not self._leaving.is_set():
                    self._hear(process, message)
                elif "left" in message:
                    break
        self._writers.pop(process, None)
        if process in self._heard and not self._leaving.is_set():
            self._lose(process, "it ended without a message, or was killed")

    def _hear(self, process: int, message: dict[str, Any]) -> None:
        now = time.monotonic()
        self._heard[process] = now
        match message:
            case {"hello": who}:
                self._members[process] = Member(*who)
            case {"beat": silence}:
                self._all_heard = now - float(silence)
            case {"gone": gone, "why": why}:
                self._be_told(int(gone), str(why))
            case {"left": who, "how": how, "why": why}:
                self._part(Member(*who), how, why)

    def _send_all(self, message: dict[str, Any]) -> None:
        for writer in self._writers.values():
            # A process that reads too slowly gets no message.
            if writer.transport.get_write_buffer_size() < _MAX_BYTES:
                writer.write(_line(message))

    def _part(self, who: Member, how: Parting, why: str) -> None:
        self._heard.pop(who.process, None)
        self._writers.pop(who.process, None)
        if how == "done":
            return
        self._send_all(_parting(who, how, why))
        if self._ends_at is not None:
            return
        # This process has `timeout_sec` to end its work. A collective with the other never ends.
        self._ends_at = time.monotonic() + self._timeout_sec
        if how == "stopped":
            self._ending = SAVED_REQUEUE_ME, f"PEERS: {who} stopped: {why}."
            os.kill(os.getpid(), signal.SIGTERM)  # Stop this process as well.
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
            text = f"the other processes have ended, because this process seemed dead: {text}"
        self._finish(SAVED_REQUEUE_ME, f"PEERS: {text}")

    def _finish(self, code: int, text: str) -> None:
        self._ends_at, self._ending = time.monotonic(), (code, text)
        then = "The log of that process may give the reason."
        if code == SAVED_REQUEUE_ME:
            then = "Start all processes again: the run resumes from its last complete checkpoint."
        self._end(code, f"{text}\nThis is {self._me}. It ends now with exit code {code}. {then}")


def _parting(who: Member, how: Parting, why: str) -> dict[str, Any]:
    return {"left": who, "how": how, "why": why[:_MAX_WHY]}


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


async def _next_message(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Returns the next message, or None if the connection is closed or the message is invalid."""
    try:
        message = strict_json.parse(await reader.readuntil())
    except (OSError, EOFError, asyncio.LimitOverrunError, strict_json.JsonError):
        return None
    return message if isinstance(message, dict) else None
