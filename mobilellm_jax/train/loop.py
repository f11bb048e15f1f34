"""The host's side of training: feed batches, read metrics one step late, save, look, stop.

Batches are placed ahead of the step (`prefetch.py`). One that was placed and not used leaves no
trace: where a run stands in its data follows from its step.

What a run reads and where it saves is handed in (`Hooks`), so this file knows neither data formats
nor checkpoints.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

import jax
import numpy as np

from mobilellm_jax.config import Config
from mobilellm_jax.train.metrics import MetricsWriter, model_flops_utilization
from mobilellm_jax.train.prefetch import prefetch
from mobilellm_jax.train.state import TrainState
from mobilellm_jax.train.step import Batch, StepMetrics, TrainStep


class TrainingDivergedError(RuntimeError):
    """Loss or gradient stayed non-finite for `train.max_bad_steps` steps in a row."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls; steps are numbers of completed optimizer steps."""

    put: Callable[[Mapping[str, np.ndarray]], Batch]  # rows of this host -> global arrays
    save: Callable[[int, TrainState], None]
    validate: Callable[[TrainState], Mapping[str, float]]
    sample: Callable[[int, TrainState], None]
    agree: Callable[[bool], bool] = bool  # whether this process wants to stop -> whether all do


class StopRequest:
    """Remembers the first SIGTERM or SIGINT; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._old: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread only, and refuses handlers set elsewhere.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@dataclasses.dataclass
class _Meter:
    """Targets per second and share of time spent waiting for data, since the last reading."""

    targets: float = 0.0
    waited_sec: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def read(self) -> tuple[float, float]:
        elapsed = time.perf_counter() - self.started
        rates = self.targets / elapsed, self.waited_sec / elapsed
        self.reset()
        return rates

    def reset(self) -> None:
        self.targets, self.waited_sec, self.started = 0.0, 0.0, time.perf_counter()


def train_loop(
    config: Config,
    state: TrainState,
    step_fn: TrainStep,
    batches: Iterator[Mapping[str, np.ndarray]],
    hooks: Hooks,
    writer: MetricsWriter,
) -> tuple[TrainState, bool]:
    """Trains from `state.step` to `train.steps`; returns the state and whether it got there.

    It stops early, saved, at the end of the step in which SIGTERM or SIGINT arrived; where a run
    is several processes, all stop at the end of the next. Where saving and evaluation fall on the
    same step, saving comes first, so that nothing lost by an evaluation is lost to the run.

    Raises:
      TrainingDivergedError: after `train.max_bad_steps` skipped steps in a row.
    """
    train, steps = config.train, config.train.steps
    first = int(state.step)
    report = _Reporter(config, writer)

    def look(step: int) -> None:
        if train.eval_every and (step % train.eval_every == 0 or step == steps):
            report.flush()
            report.validation(step, hooks.validate(state))
        every = config.evaluate.every
        if step and every and (step % every == 0 or step == steps):
            report.flush()
            hooks.sample(step, state)
            report.meter.reset()

    # The run may have been stopped after saving this step and before looking at it.
    look(first)
    saved = first
    with StopRequest() as stop, contextlib.closing(prefetch(batches, hooks.put)) as placed:
        report.meter.reset()
        for step in range(first + 1, steps + 1):
            waiting = time.perf_counter()
            batch = next(placed)
            report.meter.waited_sec += time.perf_counter() - waiting
            state, metrics = step_fn(state, batch)
            report.step(step, metrics)
            last = step == steps or hooks.agree(stop.signal is not None)
            if last or step % train.checkpoint_every == 0:
                report.flush()
                hooks.save(step, state)
                saved = step
            look(step)
            if last:
                break
    report.flush()
    assert saved == int(state.step), "the last step is always saved"
    return state, saved == steps


class _Reporter:
    """Turns device scalars into records, one step late so that the device never waits."""

    def __init__(self, config: Config, writer: MetricsWriter) -> None:
        self.meter = _Meter()
        self._config = config
        self._writer = writer
        self._pending: tuple[int, StepMetrics] | None = None
        self._first_step: int | None = None
        self._began = time.perf_counter()

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Takes a step's metrics; reads those of the step before."""
        pending, self._pending = self._pending, (step, metrics)
        if pending is not None:
            self._record(*pending)

    def flush(self) -> None:
        """Reads the metrics of the step that was just run."""
        if self._pending is not None:
            self._record(*self._pending)
            self._pending = None

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Records an evaluation; its time counts in no training rate."""
        self._writer.write(step, values)
        shown = "  ".join(
            f"{name.removeprefix('validation/')} {v:.4f}" for name, v in values.items()
        )
        self._writer.message(f"step {step}: validation {shown}")
        self.meter.reset()

    def _record(self, step: int, metrics: StepMetrics) -> None:
        values = jax.device_get(metrics)
        config, train = self._config, self._config.train
        if values["skipped"]:
            self._writer.message(
                f"step {step}: loss {values['loss']} or gradient norm {values['grad_norm']} is not "
                f"finite; update skipped ({values['bad_steps']} in a row, samples "
                f"{(step - 1) * train.global_batch} to {step * train.global_batch - 1})"
            )
        if values["bad_steps"] >= train.max_bad_steps:
            raise TrainingDivergedError(
                f"loss or gradient was not finite in {values['bad_steps']} steps in a row, up to "
                f"step {step}. The parameters are those of the last good step. Lower "
                f"optimizer.peak_lr={config.optimizer.peak_lr} or look at the data of these steps, "
                "then start again from the last checkpoint."
            )
        self.meter.targets += float(values["targets"])
        due = step == 1 or step % train.log_every == 0 or step == train.steps
        rates: dict[str, float] = {}
        if self._first_step is None:
            # The first step compiles; rates start after it.
            self._first_step, self._began = step, time.perf_counter()
            self.meter.reset()
        elif due:
            tokens_per_sec, data_wait = self.meter.read()
            rates = {"train/tokens_per_sec": tokens_per_sec, "train/data_wait": data_wait}
            mfu = model_flops_utilization(config.model, config.data.seq_len, tokens_per_sec)
            rates |= {} if mfu is None else {"train/mfu": mfu}
        if not due:
            return
        loss = float(values["loss"])
        record = {
            "train/loss": loss,
            "train/grad_norm": float(values["grad_norm"]),
            "train/learning_rate": float(values["learning_rate"]),
            "train/attention": config.model.attention,
            **rates,
        }
        self._writer.write(step, record)
        done = step - self._first_step
        eta = (time.perf_counter() - self._began) / done * (train.steps - step) if done else 0.0
        text = f"loss {loss:.4f}"
        if rates:
            mfu_text = f"{rates['train/mfu']:.1%}" if "train/mfu" in rates else "n/a on CPU"
            text += (
                f"  {rates['train/tokens_per_sec']:,.0f} tokens/s  MFU {mfu_text}"
                f"  data wait {rates['train/data_wait']:.1%}"
            )
        self._writer.progress(step, text, eta, force=step == train.steps)
