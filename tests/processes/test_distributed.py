"""Tests that processes connect and fail together; tests/test_meshes.py trains on several."""

import json
import os
import socket
from importlib import metadata
from typing import Any

import jax
import pytest

from mobilellm_jax.config import ConfigError
from mobilellm_jax.processes import distributed
from mobilellm_jax.processes.agreement import Agreement
from mobilellm_jax.processes.source_digest import source_digest
from tests.together import free_port, run_together

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.fixture
def initialized(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Records the calls of `jax.distributed.initialize` instead of making them."""
    calls: list[dict[str, Any]] = []

    monkeypatch.setattr(jax.distributed, "initialize", lambda **known: calls.append(known))
    return calls


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replaces the environment by an empty one, which the test fills."""
    found: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", found)
    return found


def test_flags_tell_jax_everything(initialized: list[dict[str, Any]]) -> None:
    line = distributed.start("node1:8476", 4, 0)
    assert line == "process 0 of 4, from flags, process 0 at node1:8476"
    (call,) = initialized
    assert call["coordinator_address"] == "node1:8476"
    assert (call["num_processes"], call["process_id"]) == (4, 0)
    assert call["cluster_detection_method"] == "deactivate"  # also for the GPUs of this process
    for bound in ("initialization_timeout", "heartbeat_timeout_seconds"):
        assert 0 < call[bound] <= 300


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"num_processes": 2}, ["--num_processes=2 without --coordinator_address", "--process_id"]),
        ({"process_id": 0}, ["--process_id=0 without --coordinator_address and --num_processes"]),
        (
            {"coordinator_address": "a:1", "num_processes": 2},
            ["--coordinator_address=a:1, --num_processes=2 without --process_id", "all three"],
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            ["--process_id=2", "less than --num_processes=2", "from 0"],
        ),
        (
            {"coordinator_address": "node1", "num_processes": 2, "process_id": 0},
            ["--coordinator_address=node1", "HOST:PORT"],
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    flags: dict[str, Any], parts: list[str], initialized: list[dict[str, Any]]
) -> None:
    with pytest.raises(ConfigError) as error:
        distributed.start(**flags)
    for part in parts:
        assert part in str(error.value)
    assert not initialized


def test_address_may_come_from_jaxs_variable(
    environment: dict[str, str], initialized: list[dict[str, Any]]
) -> None:
    environment["JAX_COORDINATOR_ADDRESS"] = "node1:1234"
    assert "process 0 of 2" in distributed.start(num_processes=2, process_id=0)
    assert initialized[0]["coordinator_address"] == "node1:1234"


@pytest.mark.parametrize("flags", [{}, {"num_processes": 1}, {"num_processes": 1, "process_id": 0}])
def test_one_process_needs_nobody(
    flags: dict[str, Any], environment: dict[str, str], initialized: list[dict[str, Any]]
) -> None:
    environment.update(SLURM if flags else {})  # the flag has priority over the variables
    assert distributed.start(**flags).startswith("one process")
    assert not initialized


@pytest.mark.parametrize(
    ("variables", "platforms", "line"),
    [
        (SLURM, "cpu", "process 0 of 1, found by Slurm (job 4711)"),
        (OPEN_MPI, "cuda", "found by Open MPI"),
        ({}, "tpu,cpu", "found by TPU metadata"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", "found by TPU variables"),
        # JobSet on GKE starts several slices of one host each.
        (
            {**POD, "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
            "tpu,cpu",
            "found by TPU variables",
        ),
        ({**POD, "JOB_COMPLETION_INDEX": "1"}, None, "found by Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu", "one process (a single TPU host"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", "one process (no cluster"),
        (POD, None, "one process (no cluster"),  # the pod of a notebook
        ({**SLURM, "SLURM_NTASKS": "1"}, "cuda", "one process (no cluster"),
        # A shell or a batch script that was not started by srun.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, "cuda", "one process (no cluster"),
    ],
)
def test_environment_is_recognised(
    variables: dict[str, str],
    platforms: str | None,
    line: str,
    environment: dict[str, str],
    initialized: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment.update(variables)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # kubernetes is installed
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert line in distributed.start()
    finally:
        jax.config.update("jax_platforms", before)
    if "one process" in line:
        assert not initialized
    else:
        # jax finds the address and the numbers by itself.
        names = ("coordinator_address", "num_processes", "process_id")
        assert initialized[0].keys().isdisjoint(names)
        assert initialized[0].get("cluster_detection_method") is None


def test_processes_that_jax_cannot_bring_together_are_refused(
    environment: dict[str, str], initialized: list[dict[str, Any]]
) -> None:
    environment.update({**OPEN_MPI})
    del environment["OMPI_MCA_orte_hnp_uri"]  # as in Open MPI 5
    with pytest.raises(ConfigError, match=r"one of 2 processes.*--process_id=\$OMPI"):
        distributed.start()
    assert not initialized


def test_pod_of_a_job_needs_the_kubernetes_package(
    environment: dict[str, str],
    initialized: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment.update({**POD, "JOB_COMPLETION_INDEX": "0"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"jax\[k8s\].*--num_processes=1"):
        distributed.start()
    assert not initialized


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, None),  # no GPUs
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),  # two tasks share two
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, [0]),  # Slurm shows each task only its GPU
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, [0, 1]),
        # One task per node with all GPUs of the node.
        (
            {
                "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
                "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
                "SLURM_LOCALID": "0",
            },
            list(range(8)),
        ),
        ({"CUDA_VISIBLE_DEVICES": "4,5", "SLURM_STEP_TASKS_PER_NODE": "2,1"}, [0, 1]),
    ],
)
def test_gpus_of_a_slurm_task(
    variables: dict[str, str],
    gpus: list[int] | None,
    environment: dict[str, str],
    initialized: list[dict[str, Any]],
) -> None:
    environment.update({**SLURM, **variables})
    if variables.get("SLURM_STEP_TASKS_PER_NODE") == "2,1":
        environment["SLURM_LOCALID"] = "0"
    distributed.start()
    assert initialized[0]["local_device_ids"] == gpus


def test_missing_process_0_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_START_SEC", 0.3)
    address = f"localhost:{free_port()}"
    with pytest.raises(distributed.DistributedError) as error:
        distributed.start(address, 2, 1)
    assert f"--coordinator_address={address}" in str(error.value)
    assert "--process_id=0" in str(error.value)


def test_process_0_is_waited_for(initialized: list[dict[str, Any]]) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        assert "process 1 of 2" in distributed.start(f"localhost:{port}", 2, 1)
    assert initialized[0]["process_id"] == 1


def test_alone_nothing_is_asked() -> None:
    assert distributed.is_first()
    assert distributed.from_first("x", lambda: (1, 2)) == (1, 2)
    with pytest.raises(KeyError), distributed.together("x"):
        raise KeyError
    agreed = Agreement()
    assert [agreed(asked) for asked in (False, True, False)] == [False, True, False]


TALK = """
import json, os, signal, sys, time
import numpy as np
import jax
from mobilellm_jax.processes import distributed
from mobilellm_jax.processes.agreement import Agreement
from mobilellm_jax.config import ConfigError, MeshConfig
from mobilellm_jax.sharding import local_rows, make_mesh, put_batch, replicated

address, own = sys.argv[1], int(sys.argv[2])
found = {"line": distributed.start(address, 2, own), "first": distributed.is_first()}
found["backend_started"] = jax._src.xla_bridge.backends_are_initialized()

def outcome(call):
    try:
        return call()
    except (ConfigError, distributed.DistributedError, KeyError) as error:
        return f"{type(error).__name__}: {error}"

def fail(error):
    raise error

def check(failing, error):
    with distributed.together("a check"):
        if own == failing:
            raise error
    return "went on"

found["answer"] = distributed.from_first("an answer", lambda: {"pid": os.getpid()})
found["refused"] = outcome(lambda: distributed.from_first("x", lambda: fail(ConfigError("a=1"))))
found["broken"] = outcome(lambda: distributed.from_first("x", lambda: fail(KeyError("k"))))
found["all good"] = outcome(lambda: check(None, None))
found["bad input in 1"] = outcome(lambda: check(1, ConfigError("b=2")))
found["bug in 0"] = outcome(lambda: check(0, KeyError("k")))
found["late"] = outcome(lambda: distributed.from_first("x", lambda: time.sleep(1.5), 0.5))

agreed = Agreement()
found["stop"] = [agreed(own == 1 and step == 3) for step in range(6)]

# The service sets this key when a scheduler announces the end of the job.
agreed = Agreement(step=100)
other = Agreement()  # reports no step, so it cannot disturb
notice = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
found["notice"] = 0
while found["notice"] < 1000 and not agreed(False):
    found["notice"] += 1
    other(False)
    if own == 1 and found["notice"] == 5:
        client = jax._src.distributed.global_state.client
        client.key_value_set("RECEIVED_PREEMPTION_NOTICE", notice)
    time.sleep(0.01)

batch = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
found["rows"] = {}
for name, sizes in json.loads(sys.argv[3]).items():
    mesh = make_mesh(MeshConfig(**sizes))
    rows = local_rows(mesh, 8)
    placed = put_batch({"tokens": batch[rows]}, mesh, 8)["tokens"]
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(placed)
    np.testing.assert_array_equal(np.asarray(whole), batch)
    found["rows"][name] = rows.tolist()
found["processes of the slices"] = [
    sorted({d.process_index for d in part.flat})
    for part in make_mesh(MeshConfig(dcn_data=2, fsdp=2, tensor=2)).devices
]
caught = open("/proc/self/status").read().partition("SigCgt:")[2].split()[0]
found["catches SIGTERM"] = bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
print(json.dumps(found))
"""
OTHER_CODE = """
import sys
from mobilellm_jax.processes import distributed
from mobilellm_jax.processes.agreement import Agreement
from mobilellm_jax.config import ConfigError

own = int(sys.argv[2])
if own == 1:
    ours = distributed._code()
    distributed._code = lambda: {**ours, "jaxlib": "0.1.2"}
try:
    distributed.start(sys.argv[1], 2, own)
except ConfigError as error:
    print(error)
"""


def test_processes_that_run_other_code_are_refused() -> None:
    address = f"localhost:{free_port()}"
    results = run_together([["-c", OTHER_CODE, address, str(own)] for own in (0, 1)], devices=1)
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "other code than process 0:" in result.stdout
        assert f"  jaxlib: {metadata.version('jaxlib')} there, 0.1.2 here\nInstall" in result.stdout
        assert "its source" not in result.stdout  # the source is the same
    assert "process 1: other code" in results[0].stdout


def test_code_is_known_by_its_source() -> None:
    assert distributed._code()["mobilellm_jax (its source)"] == source_digest()[:12]


MESHES: dict[str, tuple[dict[str, int], list[list[int]]]] = {
    "data": ({}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    "data2_tensor4": ({"tensor": 4}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    # Both processes hold a part of every row, or the whole row.
    "tensor8": ({"data": 1, "tensor": 8}, [list(range(8))] * 2),
    "sequence8": ({"data": 1, "sequence": 8}, [list(range(8))] * 2),
}


def test_two_processes_share_one_fate() -> None:
    address = f"localhost:{free_port()}"
    meshes = json.dumps({name: sizes for name, (sizes, _) in MESHES.items()})
    results = run_together([["-c", TALK, address, str(own), meshes] for own in (0, 1)], devices=4)
    for result in results:
        assert result.returncode == 0, result.stderr
    # Gloo prints lines about connections before.
    first, second = (json.loads(result.stdout.splitlines()[-1]) for result in results)
    assert first["line"] == f"process 0 of 2, from flags, process 0 at {address}"
    assert second["line"] == f"process 1 of 2, from flags, process 0 at {address}"
    assert (first["first"], second["first"]) == (True, False)
    assert not first["backend_started"] and not second["backend_started"]
    assert second["answer"] == first["answer"]

    assert first["refused"] == "ConfigError: a=1"
    assert second["refused"] == "ConfigError: process 0: a=1"
    assert first["broken"] == "KeyError: 'k'"
    assert second["broken"] == "DistributedError: x: process 0 failed with KeyError: 'k'"
    assert first["all good"] == second["all good"] == "went on"
    assert first["bad input in 1"] == "ConfigError: process 1: b=2"
    assert second["bad input in 1"] == "ConfigError: b=2"
    assert first["bug in 0"] == "KeyError: 'k'"
    assert second["bug in 0"] == "DistributedError: a check: process 0 failed with KeyError: 'k'"
    assert first["late"] is None
    assert second["late"].startswith("DistributedError: x: no message")

    # Process 1 asks in step 3, and both hear it in step 4.
    assert first["stop"] == second["stop"] == [False] * 4 + [True, False]
    # A notice to the coordination service stops both in the same step.
    assert 5 <= first["notice"] == second["notice"] < 1000
    expected = {name: rows for name, (_, rows) in MESHES.items()}
    assert {name: [first["rows"][name], second["rows"][name]] for name in MESHES} == expected
    # Outside the training loop SIGTERM ends the process.
    assert not first["catches SIGTERM"] and not second["catches SIGTERM"]
    assert first["processes of the slices"] == [[0], [1]]
