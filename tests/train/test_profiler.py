"""Tests the choice of the profiled steps and the files of a profile."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax.config import ConfigError
from mobilellm_jax.train.profiler import ProfiledSteps, profiled
from mobilellm_jax.train.side_records import SideRecords


def test_range_of_steps() -> None:
    assert ProfiledSteps.parse("10:12") == ProfiledSteps(10, 12)
    assert ProfiledSteps.parse("7") == ProfiledSteps(7, 7)


@pytest.mark.parametrize("text", ["", "a", "1:", ":3", "1-3", "1:2:3", "-1:2", "0:2", "5:4"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--profile_steps=.*10:12"):
        ProfiledSteps.parse(text)


@pytest.mark.parametrize(("first", "last"), [(4, 6), (9, 11)])
def test_steps_that_the_run_does_not_take_are_refused(first: int, last: int) -> None:
    ProfiledSteps(5, 10).check(4, 10)
    with pytest.raises(ConfigError, match=f"--profile_steps={first}:{last} must lie.*5 to 10"):
        ProfiledSteps(first, last).check(4, 10)


def trained_steps(folder: Path) -> set[str]:
    """Returns the numbers of the steps that the viewer of the trace shows."""
    (trace,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("name") == "train"]
    return {event["args"]["step_num"] for event in named}


def test_trace_holds_these_steps_and_no_others(
    prepare: Callable, make_batch: Callable, tmp_path: Path
) -> None:
    run = prepare(1)
    state: Any = run.state()
    with profiled(run.step_fn, ProfiledSteps(3, 4), 1, tmp_path, SideRecords()) as step:
        for seed in range(2, 7):
            state, _ = step(state, run.put(make_batch(seed)))
            assert (tmp_path / "memory-step-4.prof").exists() == (seed >= 4)
    assert int(state.step) == 5
    assert trained_steps(tmp_path) == {"3", "4"}
    (space,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert b"jit_step" in space.read_bytes()
    assert gzip.decompress((tmp_path / "memory-step-4.prof").read_bytes())


def test_run_that_ends_meanwhile_keeps_its_profile(
    prepare: Callable, make_batch: Callable, tmp_path: Path
) -> None:
    run = prepare(1)
    with (
        pytest.raises(KeyboardInterrupt),
        profiled(run.step_fn, ProfiledSteps(1, 9), 0, tmp_path, SideRecords()) as step,
    ):
        step(run.state(), run.put(make_batch(0)))
        raise KeyboardInterrupt
    assert trained_steps(tmp_path) == {"1"}
    assert (tmp_path / "memory-step-1.prof").exists()
