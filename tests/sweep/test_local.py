"""Runs a sweep's real processes: several at once, failing, killed, started again."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax import checkpoint
from tests import lives
from tests.faults.records import assert_same_run
from tests.sweep.conftest import STEPS

SLOW, FAST, TUNED = NAMES = ("data=1-lr1e-05-s0", "data=1-lr0.01-s0", "data=1-s1")
TUNE = ("--sweep=mesh.data=1", "--tune_lr=1e-5,1e-2", "--seeds=2", "--parallel=2")
_WAIT_SEC = 900  # the limit allows for a machine that does other work

_started: list[ForkServerProcess] = []


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    """Ends the processes that a failing test has started: runs notice the end of their sweep."""
    yield
    for process in _started:
        process.kill()
        process.join()
    _started.clear()


def start(config_file: Path, sweep: Path, *flags: str) -> ForkServerProcess:
    """Starts a sweep: by default two learning rates at once, and a seed with the better rate."""
    command = ["sweep", f"--config={config_file}", f"--workdir={sweep}", "--flops_per_sec=1e9"]
    process = lives.start([*command, *(flags or TUNE)], sweep.with_suffix(".log"))
    _started.append(process)
    return process


def end(process: ForkServerProcess, sweep: Path) -> int | None:
    """Waits until the sweep has ended, and returns its exit code."""
    process.join(_WAIT_SEC)
    assert process.exitcode is not None, said(sweep)
    return process.exitcode


def said(sweep: Path) -> str:
    return sweep.with_suffix(".log").read_text()


def steps_of(sweep: Path, name: str) -> int:
    file = sweep / "runs" / name / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def outcome_file(sweep: Path, name: str) -> Path:
    return sweep / "runs" / name / "outcome.json"


def outcome(sweep: Path, name: str) -> dict[str, Any]:
    file = outcome_file(sweep, name)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def wait_until(holds: Callable[[], bool], process: ForkServerProcess, sweep: Path) -> None:
    deadline = time.monotonic() + _WAIT_SEC
    while not holds():
        assert process.is_alive() and time.monotonic() < deadline, said(sweep)
        time.sleep(0.002)


def has_saved(sweep: Path, name: str) -> bool:
    return checkpoint.latest_step(sweep / "runs" / name) is not None


def kill_run(sweep: Path, name: str) -> None:
    """Kills the process that trains a run; the lock of the run names this process."""
    holder = json.loads((sweep / "runs" / name / "run.lock").read_text())
    os.kill(holder["pid"], signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a sweep that nothing interrupts."""
    sweep = tmp_path_factory.mktemp("whole") / "sweep"
    assert end(start(config_file, sweep), sweep) == 0, said(sweep)
    return sweep


@pytest.mark.slow
def test_another_seed_takes_the_best_rate(whole: Path) -> None:
    config = json.loads((whole / "runs" / TUNED / "config.json").read_text())
    assert config["optimizer"]["peak_lr"] == 1e-2
    assert config["train"]["seed"] == config["data"]["seed"] == 1


@pytest.mark.slow
def test_a_failed_run_is_marked_and_stops_no_other(config_file: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    # A mesh of three cannot exist on one device.
    short = ("--config.train.steps=4", "--config.train.eval_every=4", "--config.evaluate.every=4")
    process = start(config_file, sweep, "--sweep=mesh.data=3,1", *short)
    assert end(process, sweep) == 1, said(sweep)
    failed, finished = outcome(sweep, "data=3-s0"), outcome(sweep, "data=1-s0")
    assert failed["state"] == "failed"
    assert "must use all 1 devices" in failed["reason"]
    assert (finished["state"], finished["steps"]) == ("finished", 4)
    assert finished["peak_host_bytes"] > 1e8
    assert "failed  data=3-s0: see " in said(sweep)
    assert "1 of 2 runs failed; the same command tries them again" in said(sweep)


@pytest.mark.slow
def test_killed_and_started_again_it_loses_and_repeats_nothing(
    config_file: Path, tmp_path: Path, whole: Path
) -> None:
    sweep = tmp_path / "sweep"

    # A run that is killed has no time to save and cannot mark itself. SIGTERM saves the other run.
    process = start(config_file, sweep)
    wait_until(lambda: has_saved(sweep, SLOW) and steps_of(sweep, FAST) >= 1, process, sweep)
    kill_run(sweep, SLOW)
    wait_until(lambda: bool(outcome(sweep, SLOW)), process, sweep)
    assert outcome(sweep, SLOW)["reason"] == "its process ended with signal SIGKILL"
    process.terminate()
    assert end(process, sweep) == 75, said(sweep)
    assert f"saved   {FAST}" in said(sweep)
    assert not outcome(sweep, FAST)

    # The next sweep tries the failed run again and resumes the saved run. This kill spares the run
    # under way. The run notices, saves and ends, and the sweep after that waits for it.
    process = start(config_file, sweep)
    wait_until(lambda: steps_of(sweep, TUNED) >= 2, process, sweep)
    process.kill()
    end(process, sweep)
    finished = {name: outcome_file(sweep, name).stat().st_mtime_ns for name in (SLOW, FAST)}
    assert end(start(config_file, sweep), sweep) == 0, said(sweep)

    for name in NAMES:
        assert_same_run(sweep / "runs" / name, whole / "runs" / name, STEPS)
        assert outcome(sweep, name)["state"] == "finished"
        assert "resume  from step" in (sweep / "logs" / f"{name}.log").read_text()
        assert said(sweep).count(f"start   {name} on cores ") == 2
    for name, changed in finished.items():
        assert outcome_file(sweep, name).stat().st_mtime_ns == changed
    # The last sweep has nothing to do.
    assert end(start(config_file, sweep), sweep) == 0
    assert said(sweep).count("start   ") == 6


@pytest.mark.soak
def test_a_sweep_and_its_runs_may_be_killed_together(
    config_file: Path, tmp_path: Path, whole: Path
) -> None:
    sweep = tmp_path / "sweep"
    process = start(config_file, sweep)
    wait_until(lambda: all(steps_of(sweep, n) >= 2 for n in (SLOW, FAST)), process, sweep)
    process.kill()
    for name in (SLOW, FAST):
        kill_run(sweep, name)
    end(process, sweep)
    assert end(start(config_file, sweep), sweep) == 0, said(sweep)
    for name in NAMES:
        assert_same_run(sweep / "runs" / name, whole / "runs" / name, STEPS)
        assert outcome(sweep, name)["state"] == "finished"
