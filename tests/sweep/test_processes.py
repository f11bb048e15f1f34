"""Tests the promises between the processes of a sweep, one promise at a time."""

import fcntl
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mobilellm_jax.sweep import local
from mobilellm_jax.sweep.local import Child
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.sweep.slots import Slot
from tests import tiny
from tests.together import ROOT


def test_a_sweep_waits_for_the_runs_of_one_that_was_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The processes hold the lock that they inherited until they have saved."""
    caplog.set_level("INFO")
    entered = threading.Event()

    def enter() -> None:
        with local.alone(tmp_path):
            entered.set()

    with (tmp_path / "children.lock").open("a") as of_a_run:
        fcntl.flock(of_a_run, fcntl.LOCK_EX)
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(1.0)
    assert entered.wait(30)
    thread.join()
    waits = "waiting for the runs of a sweep that was killed to save and end ..."
    assert caplog.messages == [waits]


def test_a_run_ends_when_its_parent_is_gone_and_not_before() -> None:
    program = (
        "import threading, time; from mobilellm_jax.sweep import child; "
        "threading.Thread(target=child._end_with_parent, daemon=True).start(); time.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, cwd=ROOT)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_a_run_waits_until_its_learning_rate_can_be_chosen() -> None:
    slow, fast = (Run(name=name, config=tiny.RUN) for name in ("lr1", "lr2"))
    best = Run(name="best", config=tiny.RUN, tune_from=("lr1", "lr2"))
    under_way = [Child(fast, Slot("", {}), None)]
    assert local._ready([best, slow], []) is slow
    assert local._ready([best, slow], under_way) is slow
    assert local._ready([best], under_way) is None
    assert local._ready([best], []) is best
