"""Connects the processes of one run, and sends short messages between them.

jax itself runs the compiled training program in every process. This file coordinates the Python
code around that program. `jax.distributed` connects the processes (Slurm, Kubernetes JobSet, TPU
metadata, Open MPI or flags). Only process 0 writes files, and it sends its results to the others. A
check that fails in one process ends all processes with the same message. Every wait has a time
limit. A run with a single process needs no coordinator.
"""

import atexit
import contextlib
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax

from mobilellm_jax.config import ConfigError
from mobilellm_jax.errors import FAILED
from mobilellm_jax.processes.cluster import check_flags, find_cluster
from mobilellm_jax.processes.early_stop import FAREWELLS
from mobilellm_jax.processes.jax_private import delay_aborts, process_state
from mobilellm_jax.processes.peers import Parting, Peers
from mobilellm_jax.processes.source_digest import source_digest

_START_SEC = 300  # Time limit for all processes to connect.
PEER_TIMEOUT_SEC = 60.0  # If a process sends no message for this time, the run ends.
# The shortest time limit that jax has. Its error message does not name the lost process.
_JAX_HEARTBEAT_SEC = 100
_SHUTDOWN_SEC = 120  # A process that ends waits at most this long for the other processes.
_AGREE_SEC = 600  # Time limit for all processes to pass a check.
_POLL_SEC = 5  # Longest single wait; Python handles signals only between waits.

_PROGRAMS_DEPEND_ON = ("jax", "jaxlib", "flax", "optax")


class DistributedError(RuntimeError):
    """A process could not connect to another process of the run, or that process is gone."""


class _Membership:
    """The connections of this process to the other processes of its run."""

    def __init__(self) -> None:
        self.peers: Peers | None = None  # Watches the other processes.
        self._numbers = itertools.count()

    def key(self, what: str) -> str:
        """Returns a new key for the coordinator.

        All processes must make the same calls in order.
        """
        return f"mobilellm/{next(self._numbers)}/{what}"


_membership = _Membership()


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    peer_timeout_sec: float = PEER_TIMEOUT_SEC,
) -> str:
    """Connects this process with the others of the run; returns a line about the connection.

    Call this function before a backend starts. After the call, this process ends with a message if
    another process is gone. Give all of the first three arguments or none. Without them, the
    function reads the same facts from the environment.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes: number of processes; 1 without the others ignores the environment.
      process_id: number of this process, from 0.
      peer_timeout_sec: a process that sends no message for this time is considered gone; with 0,
        only jax watches the processes.

    Raises:
      ConfigError: if arguments are missing or wrong, or if process 0 runs other code.
      DistributedError: if this process cannot reach process 0.
    """
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if (coordinator_address, num_processes, process_id) != (None, None, None):
        if num_processes == 1 and not process_id:
            return "one process, as --num_processes=1 says"
        address, count, own = check_flags(coordinator_address, num_processes, process_id)
        if own:
            _wait_for(address)
        _initialize(
            peer_timeout_sec,
            coordinator_address=address,
            num_processes=count,
            process_id=own,
            cluster_detection_method="deactivate",
        )
        return f"process {own} of {count}, from flags, process 0 at {address}"
    cluster = find_cluster(os.environ)
    if not cluster.several:
        return f"one process ({cluster.name})"
    _initialize(peer_timeout_sec, local_device_ids=cluster.devices)
    state = process_state()
    return f"process {state.process_id} of {state.num_processes}, found by {cluster.name}"


def is_first() -> bool:
    """Returns whether this is process 0, which writes the files; starts no backend."""
    return int(process_state().process_id) == 0


def from_first(what: str, compute: Callable[[], Any], timeout_sec: float = _AGREE_SEC) -> Any:
    """Runs `compute` in process 0, and returns its result (as JSON) in all processes.

    Raises:
      ConfigError: in all processes, if process 0 found a mistake of the user.
      DistributedError: in the other processes, if process 0 failed otherwise or took too long.
    """
    client = _client()
    if client is None:
        return compute()
    key = _membership.key(what)
    if not is_first():
        answer = json.loads(_read(client, key, what, timeout_sec))
        _raise_if_failed(answer, 0, what)
        return answer["value"]
    try:
        value = compute()
    except BaseException as error:
        client.key_value_set(key, json.dumps(_failure(error)))
        raise
    client.key_value_set(key, json.dumps({"value": value}))
    return value


@contextlib.contextmanager
def together(what: str, timeout_sec: float = _AGREE_SEC) -> Iterator[None]:
    """Waits until all processes have run the block; an error in one is raised in all.

    Raises:
      ConfigError: in all processes, if a process found a mistake of the user.
      DistributedError: if a process failed otherwise, or did not arrive in time.
    """
    client = _client()
    if client is None:
        yield
        return
    own, count = process_state().process_id, process_state().num_processes
    key = _membership.key(what)
    try:
        yield
    except BaseException as error:
        client.key_value_set(f"{key}/{own}", json.dumps(_failure(error)))
        if own == 0:
            client.key_value_set(f"{key}/all", json.dumps({"process": 0, **_failure(error)}))
        raise
    client.key_value_set(f"{key}/{own}", "{}")
    if own == 0:
        # Only process 0 reads all answers: n reads for n processes, and not n^2 reads.
        answers = [json.loads(_read(client, f"{key}/{p}", what, timeout_sec)) for p in range(count)]
        failed = [{"process": p, **answer} for p, answer in enumerate(answers) if answer]
        client.key_value_set(f"{key}/all", json.dumps(failed[0] if failed else {}))
    verdict = json.loads(_read(client, f"{key}/all", what, timeout_sec))
    if verdict:
        _raise_if_failed(verdict, verdict["process"], what)


def errors_of_all(what: str, error: str, timeout_sec: float = _AGREE_SEC) -> list[str]:
    """Returns the error of each process, or "" for a process without an error.

    All processes call this function, and it waits until all of them have done so.

    Raises:
      DistributedError: if a process did not call the function in time.
    """
    client = _client()
    if client is None:
        return [error]
    own, count = process_state().process_id, process_state().num_processes
    key = _membership.key(what)
    client.key_value_set(f"{key}/{own}", json.dumps(error))
    if own == 0:
        errors = [json.loads(_read(client, f"{key}/{p}", what, timeout_sec)) for p in range(count)]
        client.key_value_set(f"{key}/all", json.dumps(errors))
    answer: list[str] = json.loads(_read(client, f"{key}/all", what, timeout_sec))
    return answer


def leave(how: Parting, why: str = "") -> None:
    """Tells the other processes that this process ends, and why (see `Peers.leave`)."""
    if _membership.peers is not None:
        _membership.peers.leave(how, why)


@contextlib.contextmanager
def telling_failures() -> Iterator[None]:
    """If an error or a signal ends the block, tells the other processes the reason.

    Raises:
      DistributedError: if a jax error in the block came from another process that is gone.
    """
    try:
        with FAREWELLS.during(lambda: leave("stopped", "a signal asked it to stop")):
            yield
    except BaseException as error:
        peers, why = _membership.peers, None
        if peers is not None and isinstance(error, jax.errors.JaxRuntimeError):
            why = peers.explain()
        leave("failed", f"{type(error).__name__}: {error}")
        if why is not None:
            raise DistributedError(why) from error
        raise


def _at_exit() -> None:
    leave("done")
    if getattr(sys, "last_value", None) is not None:
        # Python has printed the traceback. jax would now wait until the other processes exit too.
        # They do not exit, because they wait for this process. So jax would abort after a timeout.
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(FAILED)


def _wait_for(address: str) -> None:
    """Waits until process 0 listens. If jax waited instead, it would abort without a message."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _START_SEC
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_POLL_SEC).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"no process 0 at --coordinator_address={address} within {_START_SEC} s "
                    f"({error}); start it with the same flags and --process_id=0, and check that "
                    "this machine can reach that port."
                ) from error
        time.sleep(0.2)


def _initialize(peer_timeout_sec: float, **known: Any) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    jax.distributed.initialize(
        **known,
        initialization_timeout=_START_SEC,
        # jax waits longer than `Peers`, so that `Peers` reports a lost process first. The message
        # of `Peers` names the process.
        heartbeat_timeout_seconds=max(_JAX_HEARTBEAT_SEC, math.ceil(2 * peer_timeout_sec)),
        shutdown_timeout_seconds=_SHUTDOWN_SEC,
    )
    # jax has installed a handler that only records SIGTERM. Outside the training loop, which has
    # its own handler, SIGTERM must end the process, for example during a long compilation.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    if peer_timeout_sec and _client() is not None:
        _watch_peers(peer_timeout_sec)
    _check_code()


def _watch_peers(timeout_sec: float) -> None:
    state, client = process_state(), _client()
    peers = Peers(state.process_id, state.num_processes, timeout_sec)
    if is_first():
        client.key_value_set("mobilellm/peers", json.dumps(peers.listen()))
    else:
        what = "finding process 0"
        port, token = json.loads(_read(client, "mobilellm/peers", what, _START_SEC))
        host = state.coordinator_address.rpartition(":")[0].strip("[]")
        try:
            peers.connect(host, port, token)
        except OSError as error:
            raise DistributedError(
                f"process 0 cannot be reached at {host}:{port} ({error}); allow "
                "connections between the processes at any port, or give --peer_timeout=0. Then "
                "only jax watches the processes, which takes longer and gives no name."
            ) from error
    delay_aborts()
    peers.start()
    _membership.peers = peers
    atexit.register(_at_exit)


def _check_code() -> None:
    """Checks that all processes run the same code; otherwise they could wait for ever."""
    with together("comparing versions"):
        own = _code()
        first = from_first("versions", lambda: own)
        different = [
            f"  {name}: {first.get(name)} there, {own.get(name)} here"
            for name in sorted({*first, *own})
            if first.get(name) != own.get(name)
        ]
        if different:
            lines = "\n".join(different)
            raise ConfigError(
                f"other code than process 0:\n{lines}\nInstall the same packages on every machine."
            )


def _code() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in _PROGRAMS_DEPEND_ON}
    return {**versions, "mobilellm_jax (its source)": source_digest()[:12]}


def _client() -> Any:
    return process_state().client


def _read(client: Any, key: str, what: str, timeout_sec: float) -> str:
    deadline = time.monotonic() + timeout_sec
    while True:
        left = deadline - time.monotonic()
        try:
            value: str = client.blocking_key_value_get(key, int(1000 * min(left, _POLL_SEC)))
            return value
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            if time.monotonic() + 0.01 > deadline:
                raise DistributedError(
                    f"{what}: no message from the other processes within {timeout_sec:.0f} s; look "
                    "into their logs."
                ) from error


def _failure(error: BaseException) -> dict[str, Any]:
    bad_input = isinstance(error, (ValueError, OSError))
    return {"bad_input": bad_input, "error": str(error), "type": type(error).__name__}


def _raise_if_failed(answer: Mapping[str, Any], process: int, what: str) -> None:
    if "error" not in answer:
        return
    if answer["bad_input"]:
        raise ConfigError(f"process {process}: {answer['error']}")
    raise DistributedError(
        f"{what}: process {process} failed with {answer['type']}: {answer['error']}"
    )
