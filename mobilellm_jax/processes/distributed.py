"""Several processes as one run: how they find each other, and the little that they tell each other.

Training itself needs none of this: every process runs the same program on its part of the same
global arrays. What is here happens on the hosts. Processes meet through `jax.distributed` (Slurm,
Kubernetes JobSet, TPU metadata, Open MPI, or flags). Process 0 alone writes files and tells the
others what came of it. A check that fails in one process ends all of them, with its message. Every
wait has an end.

A run of one process passes through all of it without a coordinator.
"""

import atexit
import contextlib
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mobilellm_jax.config import ConfigError
from mobilellm_jax.errors import FAILED
from mobilellm_jax.processes.cluster import find_cluster
from mobilellm_jax.processes.early_stop import FAREWELLS
from mobilellm_jax.processes.peers import Parting, Peers, delay_aborts
from mobilellm_jax.processes.source_digest import source_digest

_START_SEC = 300  # for all processes to be there
PEER_TIMEOUT_SEC = 60.0  # without a sign of life, a process counts as gone and ends the run
_JAX_HEARTBEAT_SEC = 100  # the same, as jax has it, which aborts without saying who is gone
_SHUTDOWN_SEC = 120  # that a process waits for the others at its end
_AGREE_SEC = 600  # for all processes to come through a check
_POLL_SEC = 5  # signals are heard only between two polls

_PROGRAMS_FOLLOW_FROM = ("jax", "jaxlib", "flax", "optax")

_numbers = itertools.count()
_peers: Peers | None = None


class DistributedError(RuntimeError):
    """Processes lost or never found each other."""


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    peer_timeout_sec: float = PEER_TIMEOUT_SEC,
) -> str:
    """Joins the processes of the run; call it before anything starts a backend.

    From then on this process ends, with its name, if another one is gone.

    Args:
      coordinator_address: HOST:PORT of process 0. All three, or none: then the environment is
        asked.
      num_processes: of the run; 1 alone says that there are no others whatever the environment
        looks like.
      process_id: of this one, from 0.
      peer_timeout_sec: silence after which another process counts as gone; 0 leaves that to jax.

    Returns:
      One line that says what was found.

    Raises:
      ConfigError: for some of the arguments without the others, or impossible ones; if this process
        runs other code than process 0.
      DistributedError: if process 0 cannot be reached.
    """
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if (coordinator_address, num_processes, process_id) != (None, None, None):
        if num_processes == 1 and not process_id:
            return "one process, as --num_processes=1 says"
        address, count, own = _checked(coordinator_address, num_processes, process_id)
        if own:
            _wait_for(address)
        _initialize(*(address, count, own, peer_timeout_sec), cluster_detection_method="deactivate")
        _same_code()
        return f"process {own} of {count}, from flags, process 0 at {address}"
    cluster = find_cluster(os.environ)
    if not cluster.several:
        return f"one process ({cluster.name})"
    _initialize(None, None, None, peer_timeout_sec, local_device_ids=cluster.devices)
    _same_code()
    state = _state()
    return f"process {state.process_id} of {state.num_processes}, found by {cluster.name}"


def is_first() -> bool:
    """Returns whether this is the process that writes files; starts no backend."""
    return int(_state().process_id) == 0


def from_first(what: str, compute: Callable[[], Any], timeout_sec: float = _AGREE_SEC) -> Any:
    """Returns what process 0 computes (JSON); the others wait for it.

    Raises:
      ConfigError: in all processes, if it was bad input in process 0.
      DistributedError: in the others, if process 0 failed otherwise or took too long.
    """
    client = _client()
    if client is None:
        return compute()
    key = f"mobilellm/{next(_numbers)}/{what}"
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
    """Leaves the block in all processes or in none: what one raises, all raise.

    Raises:
      ConfigError: in all processes, for the first one whose block met bad input.
      DistributedError: for one that failed otherwise, or did not get there in time.
    """
    client = _client()
    if client is None:
        yield
        return
    own, count = _state().process_id, _state().num_processes
    key = f"mobilellm/{next(_numbers)}/{what}"
    try:
        yield
    except BaseException as error:
        client.key_value_set(f"{key}/{own}", json.dumps(_failure(error)))
        if own == 0:
            client.key_value_set(f"{key}/all", json.dumps({"process": 0, **_failure(error)}))
        raise
    client.key_value_set(f"{key}/{own}", "{}")
    if own == 0:
        # Only process 0 reads them all: n reads for n processes, not n^2.
        answers = [json.loads(_read(client, f"{key}/{p}", what, timeout_sec)) for p in range(count)]
        failed = [{"process": p, **answer} for p, answer in enumerate(answers) if answer]
        client.key_value_set(f"{key}/all", json.dumps(failed[0] if failed else {}))
    verdict = json.loads(_read(client, f"{key}/all", what, timeout_sec))
    if verdict:
        _raise_if_failed(verdict, verdict["process"], what)


class Agreement:
    """Whether any process has asked for something, known to all of them in the same step.

    A signal or a clock reaches each process in a moment of its own, and a process that left the
    loop alone would leave the others waiting in a collective. So each step a flag per device is
    reduced over all of them, and the answer is read one step late, when it costs no wait.

    A preemption notice that reached jax's coordination service in any process counts as asked. The
    service settles on a step by the steps that it is told, so these are the run's, as in Orbax,
    which tells it too.
    """

    def __init__(self, step: int = 0) -> None:
        self._pending: jax.Array | None = None
        self._step = step
        self._preemption = _state().preemption_sync_manager  # None: off by jax's own setting
        self._several = jax.process_count() > 1
        if _peers is not None:
            delay_aborts()  # again: with the devices, libtpu for one has set a handler of its own
        if self._several:
            mesh = Mesh(np.array(jax.devices()), ("device",))
            self._split = NamedSharding(mesh, PartitionSpec("device"))
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, asked: bool) -> bool:
        """Returns whether any process had asked by its last call; alone, whether it asks now."""
        if not self._several:
            return asked
        self._step += 1
        if self._preemption is not None and self._preemption.reached_sync_point(self._step):
            asked = True
        flags = jax.make_array_from_callback(
            (jax.device_count(),), self._split, lambda index: np.full((1,), asked)
        )
        pending, self._pending = self._pending, self._any(flags)
        return pending is not None and bool(pending)


def leave(how: Parting, why: str = "") -> None:
    """Tells the others that this process ends now; one that does not say so is gone to them.

    Args:
      how: done; stopped, so that all shall and the run goes on later; failed.
      why: for their message.
    """
    if _peers is not None:
        _peers.leave(how, why)


@contextlib.contextmanager
def telling_failures() -> Iterator[None]:
    """Tells the other processes of the run what ends the block in this one, SIGTERM included.

    Raises:
      DistributedError: for an error of the devices that comes from another process being gone.
    """
    try:
        with FAREWELLS.during(lambda: leave("stopped", signal.SIGTERM.name)):
            yield
    except jax.errors.JaxRuntimeError as error:
        why = None if _peers is None else _peers.explain()
        leave("failed", f"{type(error).__name__}: {error}")
        if why is not None:
            raise DistributedError(why) from error
        raise
    except BaseException as error:
        leave("failed", f"{type(error).__name__}: {error}")
        raise


def _at_exit() -> None:
    leave("done")
    if getattr(sys, "last_value", None) is not None:
        # The traceback has been printed. jax would wait for the others now, which wait for this
        # process somewhere else, and abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)


def _checked(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int]:
    values = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in values.items() if value is None]
    if coordinator_address is None or num_processes is None or process_id is None:
        given = ", ".join(f"{flag}={value}" for flag, value in values.items() if value is not None)
        raise ConfigError(
            f"{given} without {' and '.join(missing)}; give all three, or none to let Slurm, "
            "Kubernetes or the TPU's metadata tell them."
        )
    if not re.fullmatch(r"[^\s/]+:\d+", coordinator_address):
        raise ConfigError(
            f"--coordinator_address={coordinator_address} must be HOST:PORT of process 0, such as "
            "node1:8476."
        )
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id={process_id} must be at least 0 and less than "
            f"--num_processes={num_processes}; number the processes from 0."
        )
    return coordinator_address, num_processes, process_id


def _wait_for(address: str) -> None:
    """Waits until process 0 listens; jax would wait too, but end in an abort without a reason."""
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


def _initialize(
    address: str | None,
    count: int | None,
    own: int | None,
    peer_timeout_sec: float,
    **more: Any,
) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    jax.distributed.initialize(
        *(address, count, own),
        initialization_timeout=_START_SEC,
        # Later than ours, which knows names.
        heartbeat_timeout_seconds=max(_JAX_HEARTBEAT_SEC, math.ceil(2 * peer_timeout_sec)),
        shutdown_timeout_seconds=_SHUTDOWN_SEC,
        **more,
    )
    # jax has set a handler that takes note of SIGTERM and goes on. The training loop has its own;
    # elsewhere, in a long compilation say, the signal shall end the process as it ends any other.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    if peer_timeout_sec and _client() is not None:
        _watch_peers(peer_timeout_sec)


def _watch_peers(timeout_sec: float) -> None:
    global _peers
    state, client = _state(), _client()
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
                f"process 0 cannot be reached at {host}:{port} ({error}); let the processes of the "
                "run connect to each other at any port, or give --peer_timeout=0: then jax alone "
                "looks for one that is gone, which takes longer and tells no name."
            ) from error
    delay_aborts()
    peers.start()
    _peers = peers
    atexit.register(_at_exit)


def _same_code() -> None:
    """Refuses processes that run different code: their programs would wait for each other for ever.

    Raises:
      ConfigError: naming what differs from process 0.
    """
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
                f"other code than that of process 0:\n{lines}\nInstall the same on every machine."
            )


def _code() -> dict[str, str]:
    """Returns what the programs of a run follow from: versions, and a digest of this package."""
    versions = {name: metadata.version(name) for name in _PROGRAMS_FOLLOW_FROM}
    return {**versions, "mobilellm_jax (its source)": source_digest()[:12]}


def _state() -> Any:
    """Returns what jax knows of the processes; unlike `jax.process_index`, it starts no backend.

    jax has no public name for it; Orbax and Flax use this one.
    """
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    """Returns the connection to the coordinator, or None in a run of one process."""
    return _state().client


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
                    f"{what}: no word from the other processes within {timeout_sec:.0f} s; their "
                    "logs say why."
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
