"""Runs a sweep's real processes: several at once, failing, killed, started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax import checkpoint
from tests.faults.records import assert_same_run
from tests.together import ROOT

STEPS = 64
NAMES = [f"num_blocks={blocks}-s{seed}" for seed in (0, 1) for blocks in (1, 2)]
_WAIT_SEC = 900  # the limit allows for a machine that does other work


def environment() -> dict[str, str]:
    """Returns the environment of a machine with one device, with the session's cache."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


_started: "list[subprocess.Popen[Any]]" = []


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    """Ends the processes that a failing test has started: runs notice the end of their sweep."""
    yield
    for process in _started:
        process.kill()
        process.wait()
    _started.clear()


def start(config_file: Path, sweep: Path, *flags: str) -> "subprocess.Popen[bytes]":
    command = [
        *(sys.executable, "-m", "mobilellm_jax", "sweep", f"--config={config_file}"),
        *("--sweep=model.num_blocks=1,2", "--seeds=2", f"--workdir={sweep}"),
        *("--flops_per_sec=1e9", *flags),
    ]
    with sweep.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    _started.append(process)
    return process


def said(sweep: Path) -> str:
    return sweep.with_suffix(".log").read_text()


def steps_of(sweep: Path, name: str) -> int:
    file = sweep / "runs" / name / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def outcome(sweep: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((sweep / "runs" / name / "outcome.json").read_text())
    return found


def wait_until(holds: Callable[[], bool], sweep: Path) -> None:
    deadline = time.monotonic() + _WAIT_SEC
    while not holds():
        assert time.monotonic() < deadline, said(sweep)
        time.sleep(0.002)


def has_saved(sweep: Path, name: str) -> bool:
    return checkpoint.latest_step(sweep / "runs" / name) is not None


def is_finished(sweep: Path, name: str) -> bool:
    return (sweep / "runs" / name / "outcome.json").exists()


def holder(sweep: Path, name: str) -> int:
    """Returns the process that trains a run, from the lock of the run."""
    return int(json.loads((sweep / "runs" / name / "run.lock").read_text())["pid"])


@pytest.mark.slow
def test_killed_and_started_again_it_loses_and_repeats_nothing(
    config_file: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    assert start(config_file, whole).wait(_WAIT_SEC) == 0, said(whole)
    killed = tmp_path / "killed"

    # The first kill also ends the run under way, which then has no time to save.
    process = start(config_file, killed)
    wait_until(lambda: is_finished(killed, NAMES[0]) and has_saved(killed, NAMES[1]), killed)
    child = holder(killed, NAMES[1])
    process.send_signal(signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    process.wait(_WAIT_SEC)
    first = (killed / "runs" / NAMES[0] / "outcome.json").stat().st_mtime_ns
    # The second kill spares the run. The run notices, saves and ends, and the next sweep waits for
    # it.
    process = start(config_file, killed)
    wait_until(lambda: is_finished(killed, NAMES[1]) and steps_of(killed, NAMES[2]) >= 2, killed)
    process.send_signal(signal.SIGKILL)
    process.wait(_WAIT_SEC)
    process = start(config_file, killed)
    assert process.wait(_WAIT_SEC) == 0, said(killed)

    for name in NAMES:
        assert_same_run(killed / "runs" / name, whole / "runs" / name, STEPS)
        assert outcome(killed, name)["state"] == "finished"
    assert (killed / "runs" / NAMES[0] / "outcome.json").stat().st_mtime_ns == first
    started = [line for line in said(killed).splitlines() if line.startswith("start ")]
    assert sum(NAMES[0] in line for line in started) == 1
    assert sum(NAMES[1] in line for line in started) == 2
    assert "resume  from step" in (killed / "logs" / f"{NAMES[1]}.log").read_text()
    # The third sweep has nothing to do.
    assert start(config_file, killed).wait(_WAIT_SEC) == 0
    assert [line for line in said(killed).splitlines() if line.startswith("start ")] == started


@pytest.mark.slow
def test_a_failed_run_is_marked_and_stops_no_other(config_file: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    # A mesh of three cannot exist on one device. Two runs train at once, each on its own cores.
    flags = ("--sweep=mesh.data=1,3", "--seeds=1", "--parallel=2")
    assert start(config_file, sweep, *flags).wait(_WAIT_SEC) == 1, said(sweep)
    names = [f"num_blocks={blocks}-data={data}-s0" for blocks in (1, 2) for data in (1, 3)]
    states = [outcome(sweep, name)["state"] for name in names]
    assert states == ["finished", "failed", "finished", "failed"]
    assert "must use all 1 devices" in outcome(sweep, names[1])["reason"]
    assert f"failed  {names[1]}: see " in said(sweep)
    assert "2 of 4 runs failed; the same command again tries them again" in said(sweep)
    assert "on cores" in said(sweep)
    assert outcome(sweep, names[0])["peak_host_bytes"] > 1e8
    assert outcome(sweep, names[0])["steps"] == STEPS
    # A run that is killed from outside cannot mark itself. The next sweep tries failed runs again.
    process = start(config_file, sweep, "--sweep=mesh.data=1,3", "--seeds=2")
    wait_until(lambda: steps_of(sweep, "num_blocks=1-data=1-s1") >= 1, sweep)
    os.kill(holder(sweep, "num_blocks=1-data=1-s1"), signal.SIGKILL)
    assert process.wait(_WAIT_SEC) == 1, said(sweep)
    assert outcome(sweep, "num_blocks=1-data=1-s1")["reason"] == (
        "its process ended with signal SIGKILL"
    )
    assert outcome(sweep, "num_blocks=2-data=1-s1")["state"] == "finished"
    started = [line for line in said(sweep).splitlines() if line.startswith("start ")]
    assert sum(names[0] in line for line in started) == 1
    assert sum(names[1] in line for line in started) == 2


@pytest.mark.slow
def test_a_signal_saves_and_the_best_rate_is_taken(config_file: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    flags = ("--sweep=model.num_blocks=1", "--tune_lr=1e-5,1e-2", "--seeds=2")
    command = [f"--config={config_file}", f"--workdir={sweep}", "--flops_per_sec=1e9", *flags]

    def tune() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "mobilellm_jax", "sweep", *command],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = "num_blocks=1-lr1e-05-s0"
    process = tune()
    wait_until(lambda: steps_of(sweep, first) >= 1, sweep)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=_WAIT_SEC)
    assert process.returncode == 75, errors
    assert f"saved   {first}" in errors
    assert not is_finished(sweep, first)
    process = tune()
    _, errors = process.communicate(timeout=_WAIT_SEC)
    assert process.returncode == 0, errors
    # At 64 steps, one of the two runs is clearly better.
    config = json.loads((sweep / "runs" / "num_blocks=1-s1" / "config.json").read_text())
    assert config["optimizer"]["peak_lr"] == 1e-2
    assert config["train"]["seed"] == config["data"]["seed"] == 1
