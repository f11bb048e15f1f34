"""The host's loop, with steps that compute nothing."""

import dataclasses
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.config import Config, DataConfig, EvaluateConfig, ModelConfig, TrainConfig
from mobilellm_jax.train.loop import Hooks, StopRequest, TrainingDivergedError, train_loop
from mobilellm_jax.train.metrics import MetricsWriter, read_metrics
from mobilellm_jax.train.spikes import nothing_yet
from mobilellm_jax.train.state import TrainState


class Watched:
    """A number on a device, which tells when the host reads it."""

    def __init__(self, value: Any, on_read: Callable[[], None]) -> None:
        self._value, self._on_read = value, on_read

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self._on_read()
        return np.asarray(self._value, dtype)


@dataclasses.dataclass
class Rig:
    """A run of fakes that writes down, in order, what the loop did."""

    folder: Path
    stream: Any
    train: dict[str, Any]
    every: int = 0  # samples
    first: int = 0
    on_step: Callable[[int], None] = lambda step: None
    agree: Callable[[bool], bool] = bool
    bad: Callable[[int], int] = lambda step: 0  # bad steps in a row
    events: list[str] = dataclasses.field(default_factory=list)

    def __call__(self) -> tuple[TrainState, bool]:
        rhythm = {"eval_every": 0, "checkpoint_every": 1000, "log_every": 1}
        config = Config(
            model=ModelConfig(attention="xla"),
            data=DataConfig(),
            train=TrainConfig(**({"global_batch": 4} | rhythm | self.train)),
            optimizer=dataclasses.replace(Config().optimizer, warmup_steps=0),
            evaluate=EvaluateConfig(every=self.every),
        )
        hooks = Hooks(
            put=lambda batch: {"tokens": jnp.asarray(batch["tokens"])},
            save=lambda step, state: self.note("save", step, state),
            validate=self.validate,
            sample=lambda step, state: self.note("sample", step, state),
            agree=self.agree,
        )
        with MetricsWriter(self.folder, self.first, config.train.steps, self.stream) as writer:
            return train_loop(
                config, state_at(self.first), self.step, self.batches(), hooks, writer
            )

    def batches(self) -> Iterator[Mapping[str, np.ndarray]]:
        for index in range(self.first, 1000):
            yield {"tokens": np.full((1, 1), index, np.int32)}

    def step(self, state: TrainState, batch: Any) -> Any:
        step = int(state.step) + 1
        assert int(batch["tokens"][0, 0]) == step - 1, "no batch is left out or used twice"
        self.events.append(f"step {step}")
        self.on_step(step)
        bad = self.bad(step)
        metrics = {
            "loss": Watched(
                np.float32(np.nan if bad else 1 / step), lambda: self.events.append(f"read {step}")
            ),
            "grad_norm": np.float32(2.0),
            "learning_rate": np.float32(0.5),
            "targets": np.float32(3),
            "skipped": np.bool_(bad > 0),
            "bad_steps": np.int32(bad),
        }
        return dataclasses.replace(state, step=jnp.int32(step)), metrics

    def note(self, what: str, step: int, state: TrainState) -> None:
        assert int(state.step) == step
        self.events.append(f"{what} {step}")

    def validate(self, state: TrainState) -> Mapping[str, float]:
        self.events.append(f"validate {int(state.step)}")
        return {"validation/loss": 0.25}

    def records(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    def done(self, *kinds: str) -> list[str]:
        return [event for event in self.events if event.split()[0] in kinds]


@pytest.fixture
def make(tmp_path: Path, stream: Any) -> Callable[..., Rig]:
    return functools.partial(Rig, tmp_path, stream)


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
    make: Callable[..., Rig], own_signal_at: int | None
) -> None:
    asked: list[bool] = []

    def agree(wanted: bool) -> bool:
        asked.append(wanted)
        return len(asked) == 4  # whatever this process wants

    def on_step(step: int) -> None:
        if step == own_signal_at:
            os.kill(os.getpid(), signal.SIGTERM)

    rig = make({"steps": 9}, agree=agree, on_step=on_step)
    state, finished = rig()
    assert (int(state.step), finished) == (4, False)
    assert rig.done("save") == ["save 4"]
    wanted = range(2, 5) if own_signal_at else ()
    assert asked == [step in wanted for step in range(1, 5)]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_rhythm_of_a_whole_run(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 7, "checkpoint_every": 3, "eval_every": 2}, every=5)
    state, finished = rig()
    assert (int(state.step), finished) == (7, True)
    # Saved before anything looks at the same step; the last step is saved, validated and sampled.
    assert rig.done("step", "save", "validate", "sample") == [
        *("validate 0", "step 1", "step 2", "validate 2", "step 3", "save 3", "step 4"),
        *("validate 4", "step 5", "sample 5", "step 6", "save 6", "validate 6"),
        *("step 7", "save 7", "validate 7", "sample 7"),
    ]
    assert [r["step"] for r in rig.records() if "validation/loss" in r] == [0, 2, 4, 6, 7]


def test_resumed_run_goes_on_with_the_next_batch(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 6, "checkpoint_every": 4, "eval_every": 5}, first=3)
    _, finished = rig()
    assert finished
    assert rig.done("step", "save", "validate") == [
        *("step 4", "save 4", "step 5", "validate 5", "step 6", "save 6", "validate 6"),
    ]


def test_finished_run_takes_no_step_and_looks_once_more(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 3, "eval_every": 1}, first=3)
    state, finished = rig()
    assert (int(state.step), finished, rig.events) == (3, True, ["validate 3"])


def test_metrics_are_read_one_step_late_and_all_are(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 5, "checkpoint_every": 3})
    rig()
    # Step n + 1 is under way when step n is read, but for what must be on disk with a checkpoint.
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
        assert "train/mfu" not in record  # a CPU's peak is not known


def test_the_next_batch_is_made_while_a_step_runs(make: Callable[..., Rig]) -> None:
    """Were it made when it is needed, the first step would wait for ever."""
    read = [threading.Event() for _ in range(8)]
    rig = make({"steps": 6}, on_step=lambda step: None)

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
        for index in range(8):
            read[index].set()
            yield {"tokens": np.full((1, 1), index, np.int32)}

    def on_step(step: int) -> None:
        assert read[step].wait(timeout=30)

    rig.batches, rig.on_step = batches, on_step  # type: ignore[method-assign]
    _, finished = rig()
    assert finished
    assert [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")] == []


def test_progress_tells_the_wait_for_data(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only the source of batches and the step move: 3 s a wait, 1 s a step."""
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
    # Numbers are read one step late: the reading for step 4 is between steps 3 and 5.
    steady = next(record for record in rig.records() if record["step"] == 4)
    assert steady["train/data_wait"] == 0.75
    assert "data wait 75.0%" in rig.stream.getvalue()
    # 3 targets in 4 seconds; the batch has 4 x 2,048 positions.
    assert steady["train/tokens_per_sec"] == 0.75


def test_log_every_thins_the_record(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 8, "log_every": 3})
    rig()
    assert [r["step"] for r in rig.records()] == [1, 3, 6, 8]
    assert rig.stream.getvalue().splitlines()[-1].startswith("step 8/8  loss 0.1250")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_saved_after_the_step(
    number: signal.Signals, make: Callable[..., Rig]
) -> None:
    before = signal.getsignal(number)
    rig = make(
        {"steps": 9, "checkpoint_every": 4},
        on_step=lambda step: send(number) if step == 2 else None,
    )
    state, finished = rig()
    assert (int(state.step), finished) == (2, False)
    assert rig.done("step", "save") == ["step 1", "step 2", "save 2"]
    assert [r["step"] for r in rig.records()] == [1, 2]
    assert signal.getsignal(number) is before


def test_signal_in_the_last_step_finds_a_finished_run(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 2}, on_step=lambda step: send(signal.SIGTERM) if step == 2 else None)
    _, finished = rig()
    assert finished
    assert rig.done("save") == ["save 2"]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_interrupt_does_not_wait(first: signal.Signals, make: Callable[..., Rig]) -> None:
    def twice(step: int) -> None:
        send(first)
        rig.events.append("still here")
        send(signal.SIGINT)
        rig.events.append("not reached")

    before = signal.getsignal(signal.SIGINT)
    rig = make({"steps": 3}, on_step=twice)
    with pytest.raises(KeyboardInterrupt):
        rig()
    assert rig.events == ["step 1", "still here"]
    assert signal.getsignal(signal.SIGINT) is before


def test_second_terminate_still_waits() -> None:
    with StopRequest() as stop:
        assert stop.signal is None
        try:
            send(signal.SIGINT)
            send(signal.SIGTERM)
        except KeyboardInterrupt:  # which would end pytest itself
            pytest.fail("interrupted")
        assert stop.signal is signal.SIGTERM


def test_skipped_steps_are_told_with_their_samples(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 4, "max_bad_steps": 3}, bad=lambda step: {2: 1, 3: 2}.get(step, 0))
    _, finished = rig()
    assert finished
    told = [line for line in rig.stream.getvalue().splitlines() if "not finite" in line]
    assert len(told) == 2
    assert told[0].startswith("step 2: loss nan or gradient norm 2.0")
    assert "1 in a row, samples 4 to 7" in told[0]
    assert "2 in a row, samples 8 to 11" in told[1]


def test_diverged_run_stops_unsaved(make: Callable[..., Rig]) -> None:
    # Steps 4, 5 and 6 are bad; step 6 is also due to be saved.
    rig = make(
        {"steps": 20, "checkpoint_every": 3, "max_bad_steps": 3},
        bad=lambda step: max(0, step - 3),
    )
    with pytest.raises(TrainingDivergedError) as error:
        rig()
    assert rig.done("save") == ["save 3"]
    assert rig.done("step")[-1] == "step 6"
    message = str(error.value)
    assert "3 steps in a row, up to step 6" in message
    assert "optimizer.peak_lr=0.002" in message
    assert "start again from the last checkpoint" in message


def test_diverged_run_is_noticed_one_step_late(make: Callable[..., Rig]) -> None:
    rig = make({"steps": 20, "max_bad_steps": 2}, bad=lambda step: step)
    with pytest.raises(TrainingDivergedError):
        rig()
    assert rig.done("step") == ["step 1", "step 2", "step 3"]
    assert rig.done("save") == []
