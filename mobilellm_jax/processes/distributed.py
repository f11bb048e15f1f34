"""Connects the processes of one run, and passes their short messages.

Every process runs the same training program on its part of the same global arrays, without this
file. This file serves the code on the hosts. Processes meet through `jax.distributed` (Slurm,
Kubernetes JobSet, TPU metadata, Open MPI or flags). Process 0 alone writes files and tells the
others the results. A check that fails in one process ends all processes with the same message.
Every wait has a time limit. A run of one process needs no coordinator.
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

_START_SEC = 300  # for all processes to connect
PEER_TIMEOUT_SEC = 60.0  # a process that is silent for so long counts as gone and ends the run
_JAX_HEARTBEAT_SEC = 100  # the same limit in jax, which aborts without a name
_SHUTDOWN_SEC = 120  # a process waits so long for the others at its end
_AGREE_SEC = 600  # for all processes to pass a check
_POLL_SEC = 5  # Python handles signals only between two polls

_PROGRAMS_DEPEND_ON = ("jax", "jaxlib", "flax", "optax")


class DistributedError(RuntimeError):
    """A process could not find another process of the run, or lost it."""


class _Membership:
    """The part of this process in its run; a process has one, like the state of jax itself."""

    def __init__(self) -> None:
        self.peers: Peers | None = None  # watches the other processes
        self._numbers = itertools.count()

    def key(self, what: str) -> str:
        """Returns a new key of the coordinator's store; the processes make equal calls."""
        return f"mobilellm/{next(self._numbers)}/{what}"


_membership = _Membership()


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    peer_timeout_sec: float = PEER_TIMEOUT_SEC,
) -> str:
    """Connects this process with the others of the run; returns one line that describes the result.

    Call this function before a backend starts. Afterwards this process ends with a message when
    another process is gone. The first three arguments come together or not at all. Without them the
    environment tells the same facts.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes: number of processes; 1 alone means that the environment is not asked.
      process_id: number of this process, from 0.
      peer_timeout_sec: a process that is silent for so long counts as gone; with 0, only jax
        watches the processes.

    Raises:
      ConfigError: if arguments are missing or impossible, or if process 0 runs other code.
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
    """Returns whether this is process 0, which writes the files; the call starts no backend."""
    return int(process_state().process_id) == 0


def from_first(what: str, compute: Callable[[], Any], timeout_sec: float = _AGREE_SEC) -> Any:
    """Returns what `compute` returns in process 0, as JSON; the other processes wait for it.

    Raises:
      ConfigError: in all processes, if process 0 found a mistake of the user.
      DistributedError: in the others, if process 0 failed otherwise or took too long.
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
    """Completes the block in all processes or in none: an error in one is raised in all.

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
        # Only process 0 reads the answers of all. That makes n reads for n processes, not n^2.
        answers = [json.loads(_read(client, f"{key}/{p}", what, timeout_sec)) for p in range(count)]
        failed = [{"process": p, **answer} for p, answer in enumerate(answers) if answer]
        client.key_value_set(f"{key}/all", json.dumps(failed[0] if failed else {}))
    verdict = json.loads(_read(client, f"{key}/all", what, timeout_sec))
    if verdict:
        _raise_if_failed(verdict, verdict["process"], what)


def leave(how: Parting, why: str = "") -> None:
    """Tells the other processes that this process ends now, and how (see `Peers.leave`)."""
    if _membership.peers is not None:
        _membership.peers.leave(how, why)


@contextlib.contextmanager
def telling_failures() -> Iterator[None]:
    """Tells the other processes why the block ended in this process, also after SIGTERM.

    Raises:
      DistributedError: if an error of the devices came from another process that is gone.
    """
    try:
        with FAREWELLS.during(lambda: leave("stopped", signal.SIGTERM.name)):
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
        # Python has printed the traceback. jax would now wait for the other processes, which wait
        # for this process at another place, and then abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)


def _wait_for(address: str) -> None:
    """Waits until process 0 listens; jax would wait as well, but abort without a reason."""
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
        # Longer than our own limit, because our message has the name of the process.
        heartbeat_timeout_seconds=max(_JAX_HEARTBEAT_SEC, math.ceil(2 * peer_timeout_sec)),
        shutdown_timeout_seconds=_SHUTDOWN_SEC,
    )
    # jax has installed a handler that only records SIGTERM. The training loop has its own handler.
    # Outside the loop, for example during a long compilation, SIGTERM has to end the process.
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
    """Checks that all processes run the same code; different programs would wait for ever."""
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
