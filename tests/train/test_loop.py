"""The training loop on the host, with steps that compute nothing."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.config import (
    Config,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mobilellm_jax.train.loop import Hooks, train_loop
from mobilellm_jax.train.metrics import MetricsWriter, read_metrics
from mobilellm_jax.train.spikes import nothing_yet
from mobilellm_jax.train.state import TrainState
from mobilellm_jax.train.stopping import StopRequest, Walltime


class Watched:
    """A loss on a device that records when the host reads it."""

    def __init__(self, value: float, events: list[str], name: str) -> None:
        self._value, self._events, self._name = value, events, name

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self._events.append(self._name)
        return np.asarray(self._value, dtype)


@dataclasses.dataclass
class Rig:
    """A run whose step computes nothing; it records the actions of the loop in order."""

    folder: Path
    train: dict[str, Any]
    every: int = 0  # interval of samples in steps
    first: int = 0
    on_step: Callable[[int], None] = lambda step: None
    agree: Callable[[bool], bool] = bool
    bad: dict[int, int] = dataclasses.field(default_factory=dict)  # step -> bad steps in a row
    spikes: tuple[int, ...] = ()  # steps
    walltime: Walltime = dataclasses.field(default_factory=Walltime)
    events: list[str] = dataclasses.field(default_factory=list)

    def __call__(self) -> tuple[TrainState, range]:
        rhythm = {"eval_every": 0, "checkpoint_every": 1000, "log_every": 1, "global_batch": 4}
        config = Config(
            model=ModelConfig(attention="xla"),
            train=TrainConfig(**(rhythm | self.train)),
            optimizer=OptimizerConfig(warmup_steps=0),
            evaluate=EvaluateConfig(every=self.every),
        )
        hooks = Hooks(
            put=lambda batch: {"tokens": jnp.asarray(batch["tokens"])},
            save=lambda step, state: self.events.append(f"save {step}"),
            finish_saving=self.finish_saving,
            validate=self.validate,
            sample=lambda step, state: self.events.append(f"sample {step}"),
            agree=self.agree,
        )
        with MetricsWriter(self.folder, self.first, config.train.steps) as writer:
            state, batches = state_at(self.first), self.batches()
            return train_loop(config, state, self.step, batches, hooks, writer, self.walltime)

    def batches(self) -> Iterator[Mapping[str, np.ndarray]]:
        for index in range(self.first, 1000):
            yield {"tokens": np.full((1, 1), index, np.int32)}

    def step(self, state: TrainState, batch: Any) -> Any:
        step = int(state.step) + 1
        assert int(batch["tokens"][0, 0]) == step - 1, "every batch is used once, in order"
        self.events.append(f"step {step}")
        self.on_step(step)
        bad = self.bad.get(step, 0)
        metrics = {
            "loss": Watched(np.nan if bad else 1 / step, self.events, f"read {step}"),
            "grad_norm": np.float32(2.0),
            "learning_rate": np.float32(0.5),
            "update_norm": np.float32(np.nan if bad else 0.25),
            "targets": np.float32(3),
            "skipped": np.bool_(bad > 0 or step in self.spikes),
            "spike": np.bool_(step in self.spikes),
            "bad_steps": np.int32(bad),
            "skipped_steps": np.int32(7),
        }
        return dataclasses.replace(state, step=jnp.int32(step)), metrics

    def finish_saving(self) -> None:
        self.events.append("saved")

    def validate(self, state: TrainState) -> Mapping[str, float]:
        self.events.append(f"validate {int(state.step)}")
        return {"validation/loss": 0.25}

    def records(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    def done(self, *kinds: str) -> list[str]:
        return [event for event in self.events if event.split()[0] in kinds]


@pytest.fixture
def make(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., Rig]:
    caplog.set_level("INFO")
    return functools.partial(Rig, tmp_path)


def state_at(step: int) -> TrainState:
    return TrainState(
        step=jnp.int32(step),
        params={},
        optimizer=(),
        key_data=jnp.zeros(2, jnp.uint32),
        bad_steps=jnp.int32(0),
        skipped_steps=jnp.int32(0),
        recent=nothing_yet(),
    )


@pytest.mark.parametrize("own_signal_at", [None, 2])
def test_processes_decide_together_when_to_stop(
    make: Callable[..., Rig], caplog: pytest.LogCaptureFixture, own_signal_at: int | None
) -> None:
    asked: list[bool] = []

    def agree(wanted: bool) -> bool:
        asked.append(wanted)
        return len(asked) == 4  # ignores the wish of this process

    def on_step(step: int) -> None:
        if step == own_signal_at:
            os.kill(os.getpid(), signal.SIGTERM)

    rig = make({"steps": 9}, agree=agree, on_step=on_step)
    state, bad = rig()
    assert (int(state.step), bad) == (4, range(0))
    why = "SIGTERM" if own_signal_at else "another process"
    assert f"step 4: stopping ({why}); saving" in caplog.text
    assert rig.done("save") == ["save 4"]
    wanted = range(2, 5) if own_signal_at else ()
    assert asked == [step in wanted for step in range(1, 5)]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_rhythm_of_a_whole_run(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 7, "checkpoint_every": 3, "eval_every": 2}, every=5)
    state, bad = rig()
    assert (int(state.step), bad) == (7, range(0))
    # A step is saved before it is evaluated. The last step is saved, validated and sampled.
    assert rig.done("step", "save", "validate", "sample") == [
        *("validate 0", "step 1", "step 2", "validate 2", "step 3", "save 3", "step 4"),
        *("validate 4", "step 5", "sample 5", "step 6", "save 6", "validate 6"),
        *("step 7", "save 7", "validate 7", "sample 7"),
    ]
    assert [r["step"] for r in rig.records() if "validation/loss" in r] == [0, 2, 4, 6, 7]


def test_resumed_run_goes_on_with_the_next_batch(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 6, "checkpoint_every": 4, "eval_every": 5}, first=3)
    state, _ = rig()
    assert int(state.step) == 6
    assert rig.done("step", "save", "validate") == [
        *("step 4", "save 4", "step 5", "validate 5", "step 6", "save 6", "validate 6"),
    ]


def test_finished_run_takes_no_step_and_looks_once_more(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 3, "eval_every": 1}, first=3)
    state, _ = rig()
    assert (int(state.step), rig.events) == (3, ["validate 3"])


def test_metrics_are_read_one_step_late_and_all_are(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 5, "checkpoint_every": 3})
    rig()
    # Step n is read after step n + 1 has started, or before a checkpoint is saved.
    assert rig.done("step", "read", "save") == [
        *("step 1", "step 2", "read 1", "step 3", "read 2", "read 3", "save 3"),
        *("step 4", "step 5", "read 4", "read 5", "save 5"),
    ]
    records = rig.records()
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert [r["train/loss"] for r in records] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert {(r["train/grad_norm"], r["train/learning_rate"]) for r in records} == {(2.0, 0.5)}
    assert {r["train/attention"] for r in records} == {"xla"}
    assert "train/tokens_per_sec" not in records[0]  # the first step compiles
    for record in records[1:]:
        assert record["train/tokens_per_sec"] > 0
        assert 0 <= record["train/data_wait"] <= 1
        assert "train/mfu" not in record  # the peak of a CPU is not listed


def test_the_next_batch_is_made_while_a_step_runs(make: Callable[..., Rig]) -> None:
    """If the loop made a batch only when it needs the batch, the first step would never end."""
    read = [threading.Event() for _ in range(8)]
    rig = make({"steps": 6}, on_step=lambda step: None)

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
        for index in range(8):
            read[index].set()
            yield {"tokens": np.full((1, 1), index, np.int32)}

    def on_step(step: int) -> None:
        assert read[step].wait(timeout=30)

    rig.batches, rig.on_step = batches, on_step  # type: ignore[method-assign]
    state, _ = rig()
    assert int(state.step) == 6
    assert [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")] == []


def test_progress_tells_the_wait_for_data(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the source of batches (3 s per batch) and the step (1 s) move the clock."""
    now = [0.0]
    monkeypatch.setattr("mobilellm_jax.train.loop.time.perf_counter", lambda: now[0])

    def unread(batches: Iterator[Mapping[str, np.ndarray]], put: Any) -> Iterator[Any]:
        for batch in batches:
            now[0] += 3.0
            yield put(batch)

    def on_step(step: int) -> None:
        now[0] += 1.0

    monkeypatch.setattr("mobilellm_jax.train.loop.prefetch", unread)
    rig = make({"steps": 6, "log_every": 2}, on_step=on_step)
    rig()
    # Metrics are read one step late: the record of step 4 is written between steps 5 and 6.
    steady = next(record for record in rig.records() if record["step"] == 4)
    assert steady["train/data_wait"] == 0.75
    assert "MFU n/a (peak not listed)  data wait 75.0%" in caplog.text
    # Only the 3 targets of a step count, not the 4 x 2,048 positions of its batch.
    assert steady["train/tokens_per_sec"] == 0.75


def test_log_every_thins_the_record(
    make: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    rig = make({"steps": 8, "log_every": 3})
    rig()
    assert [r["step"] for r in rig.records()] == [1, 3, 6, 8]
    assert caplog.messages[-1].startswith("step 8/8  loss 0.1250")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_saved_after_the_step(
    number: signal.Signals, make: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(number)
    rig = make(
        {"steps": 9, "checkpoint_every": 4},
        on_step=lambda step: send(number) if step == 2 else None,
    )
    state, bad = rig()
    assert (int(state.step), bad) == (2, range(0))
    assert rig.done("step", "save", "saved") == ["step 1", "step 2", "save 2", "saved"]
    assert [r["step"] for r in rig.records()] == [1, 2]
    assert signal.getsignal(number) is before
    assert f"step 2: stopping ({number.name}); saving" in caplog.text


def test_signal_before_the_first_step_is_done_is_left_to_the_caller(
    make: Callable[..., Rig],
) -> None:
    """The first step may compile for minutes, and the caller can end it without a loss."""
    came: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        rig = make({"steps": 3}, on_step=lambda step: send(signal.SIGTERM) if step < 3 else None)
        state, bad = rig()
    finally:
        signal.signal(signal.SIGTERM, old)
    assert came == [signal.SIGTERM]
    assert (int(state.step), bad) == (2, range(0))


def test_signal_in_the_last_step_finds_a_finished_run(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 2}, on_step=lambda step: send(signal.SIGTERM) if step == 2 else None)
    state, _ = rig()
    assert int(state.step) == 2
    assert rig.done("save") == ["save 2"]


TWICE = """
import os, signal, sys, time
from mobilellm_jax.train.stopping import StopRequest

with StopRequest() as stop:
    os.kill(os.getpid(), int(sys.argv[1]))
    print("still here", flush=True)
    # A library may wait in a call that Python's handlers cannot interrupt.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.kill(os.getpid(), int(sys.argv[2]))
    print("not reached" if int(sys.argv[2]) == signal.SIGINT else "waits", flush=True)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_interrupt_does_not_wait(first: signal.Signals) -> None:
    command = [sys.executable, "-c", TWICE, str(int(first)), str(int(signal.SIGINT))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (-signal.SIGINT, "still here\n"), result.stderr


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_terminate_still_waits(first: signal.Signals) -> None:
    command = [sys.executable, "-c", TWICE, str(int(first)), str(int(signal.SIGTERM))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "still here\nwaits\n"), result.stderr


def test_the_first_signal_is_reported() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.signal is None
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop.signal is signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_skipped_steps_are_reported_with_their_samples(
    make: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    rig = make(
        {"steps": 9, "max_bad_steps": 3, "log_every": 100, "spike_factor": 6.0},
        bad={2: 1, 3: 2},
        spikes=(5,),
    )
    state, _ = rig()
    assert int(state.step) == 9
    told = [line for line in caplog.messages if "SKIPPED" in line]
    assert len(told) == 3
    assert told[0].startswith("SKIPPED step 2, not finite (1 of train.max_bad_steps=3 in a row)")
    assert "loss nan, gradient norm 2, update norm nan; samples 4 to 7" in told[0]
    assert "(2 of train.max_bad_steps=3 in a row)" in told[1]
    assert "samples 8 to 11" in told[1]
    assert told[2].startswith("SKIPPED step 5, a spike (train.spike_factor=6.0): loss 0.2")
    # Skipped steps are recorded although log_every=100, without NaN, which JSON does not have.
    skipped = [r for r in rig.records() if "train/skipped_steps" in r]
    assert [r["step"] for r in skipped] == [2, 3, 5]
    assert [r["train/bad_steps"] for r in skipped] == [1, 2, 0]
    assert [r["train/first_sample"] for r in skipped] == [4, 8, 16]
    assert ["train/loss" in r for r in skipped] == [False, False, True]
    assert {r["train/skipped_steps"] for r in skipped} == {7}
    assert "NaN" not in (rig.folder / "metrics.jsonl").read_text()


def test_diverged_run_ends_unsaved(make: Callable[..., Rig]) -> None:
    # Steps 4, 5 and 6 are bad, and step 6 is due for a checkpoint.
    rig = make(
        {"steps": 20, "checkpoint_every": 3, "max_bad_steps": 3},
        bad={4: 1, 5: 2, 6: 3},
    )
    _, bad = rig()
    assert bad == range(4, 7)
    assert rig.done("save") == ["save 3"]
    assert rig.done("step")[-1] == "step 6"


def test_diverged_run_is_noticed_one_step_late(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 20, "max_bad_steps": 2}, bad={1: 1, 2: 2, 3: 3})
    _, bad = rig()
    assert bad == range(1, 3)
    assert rig.done("step") == ["step 1", "step 2", "step 3"]
    assert rig.done("save") == []


def test_nothing_is_saved_after_a_bad_step_except_at_the_end_of_the_run(
    make: Callable[..., Rig],
) -> None:
    rig = make({"steps": 9, "checkpoint_every": 2}, bad={3: 1, 4: 2, 8: 1, 9: 2})
    state, _ = rig()
    assert int(state.step) == 9
    assert rig.done("save") == ["save 2", "save 6", "save 9"]


def test_walltime_ends_the_run_saved_in_time(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only steps (10 s), saves (25 s) and evaluations (100 s) move the clock."""
    now = [0.0]
    monkeypatch.setattr("mobilellm_jax.train.loop.time.monotonic", lambda: now[0])

    def on_step(step: int) -> None:
        now[0] += 60 if step == 1 else 10  # the first step compiles

    class Slow(Rig):
        def finish_saving(self) -> None:
            now[0] += 25
            super().finish_saving()

        def validate(self, state: TrainState) -> Mapping[str, float]:
            now[0] += 100
            return super().validate(state)

    rig = make({"steps": 1000, "checkpoint_every": 3})
    limit = Walltime(400.0, now=lambda: now[0])
    slow = Slow(rig.folder, rig.train, on_step=on_step, walltime=limit)
    state, _ = slow()
    assert "stopping (--max_walltime=400 s)" in caplog.text
    # The loop reserves two steps (20 s), two saves (50 s) and a hundredth of the limit (4 s).
    assert slow.done("save", "saved")[:3] == ["save 3", "saved", "save 6"]
    assert slow.done("save", "saved")[-2:] == [f"save {int(state.step)}", "saved"]
    ended = now[0]
    assert 400 - 74 <= ended - 25 < 400 - 74 + 10
    assert ended <= 400

    # The next step is due for an evaluation, which would not fit.
    now[0] = 0.0
    limit = Walltime(400.0, now=lambda: now[0])
    train = {"steps": 1000, "checkpoint_every": 3, "eval_every": 15}
    slow = Slow(rig.folder, train, on_step=on_step, walltime=limit)
    state, _ = slow()
    assert int(state.step) == 14
    assert slow.done("validate") == ["validate 0"]
