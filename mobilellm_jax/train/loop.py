"""Runs the training loop on the host: feeds batches, reads metrics, saves, evaluates and stops.

The loop reads the metrics of a step while the next step runs, and places batches ahead of the step
(`prefetch.py`). A batch that was placed but not used has no effect, because the position of a run
in its data follows from its step.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np

from mobilellm_jax.config import Config
from mobilellm_jax.train.metrics import MetricsWriter
from mobilellm_jax.train.prefetch import prefetch
from mobilellm_jax.train.report import Reporter
from mobilellm_jax.train.state import TrainState
from mobilellm_jax.train.step import Batch, TrainStep
from mobilellm_jax.train.stopping import StopRequest, Walltime


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls; a step number counts completed optimizer steps."""

    put: Callable[[Mapping[str, np.ndarray]], Batch]  # turns rows of this host into global arrays
    save: Callable[[int, TrainState], None]  # may return before the checkpoint is complete
    finish_saving: Callable[[], None]  # waits until the checkpoint is complete; raises its errors
    validate: Callable[[TrainState], Mapping[str, float]]
    sample: Callable[[int, TrainState], None]
    # Returns whether a save failed and has to be repeated now; all processes get the same value.
    retry_is_due: Callable[[], bool] = lambda: False
    # Takes whether this process wants to stop, and returns whether all processes stop.
    agree: Callable[[bool], bool] = lambda asked: asked


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended; a diverged run is not saved."""

    kind: Literal["finished", "stopped", "diverged"]
    why: str = ""  # reason of a stop
    bad: range = range(0)  # last steps of a diverged run


def train_loop(
    config: Config,
    state: TrainState,
    step_fn: TrainStep,
    batches: Iterator[Mapping[str, np.ndarray]],
    hooks: Hooks,
    writer: MetricsWriter,
    walltime: Walltime | None = None,
) -> tuple[TrainState, Outcome]:
    """Trains from `state.step` to `train.steps`; returns the final state and the outcome.

    The loop saves and stops at the end of a step if SIGTERM or SIGINT arrived or `walltime` is up;
    with several processes, all of them stop one step later. The caller handles signals that arrive
    before the first step starts. A run diverges if its last `train.max_bad_steps` steps were not
    finite. After a bad step the loop does not save, because the run could not heal from such a
    state. The last state of a run is always saved, unless the run diverged.
    """
    train, first, steps = config.train, int(state.step), config.train.steps
    watch = _Watch(config, hooks, Reporter(config, writer), walltime)
    report, stop = watch.report, StopRequest()
    # A run may have been stopped after it saved this step and before it evaluated it. The loop
    # saves before it evaluates, so that a failed evaluation loses nothing.
    watch.look(first, state)
    with contextlib.ExitStack() as stack:
        placed = stack.enter_context(contextlib.closing(prefetch(batches, hooks.put)))
        report.meter.reset()
        for step in range(first + 1, steps + 1):
            began = time.monotonic()
            batch = report.meter.wait_for(placed)
            state, metrics = step_fn(state, batch)
            if step == first + 1:
                # Before this moment the step may compile for minutes, and there is nothing to save.
                stack.enter_context(stop)
            report.step(step, metrics)
            if step > first + 1:  # the first step compiles, so its time is no estimate
                watch.measured("step", time.monotonic() - began)
            why = watch.reason_to_stop(step, stop)
            stopping = hooks.agree(bool(why)) and step < steps
            last = stopping or step == steps
            due = last or step % train.checkpoint_every == 0 or hooks.retry_is_due()
            if due:
                report.flush()
            if report.diverged:
                return state, Outcome("diverged", bad=report.bad)
            if last or (due and not report.bad):
                if stopping:
                    why = why or "another process"
                    writer.message(f"step {step}: stopping ({why}); saving, then leaving")
                watch.save(step, state, wait=last)
            if stopping:
                return state, Outcome("stopped", why)
            watch.look(step, state)
    return state, Outcome("finished")


@dataclasses.dataclass(frozen=True)
class _Watch:
    """Saves and evaluates the run, and measures the times for the time limit."""

    config: Config
    hooks: Hooks
    report: Reporter
    walltime: Walltime | None

    def measured(self, kind: Literal["step", "save", "look"], seconds: float) -> None:
        if self.walltime is not None:
            self.walltime.measured(kind, seconds)

    def reason_to_stop(self, step: int, stop: StopRequest) -> str:
        if stop.signal is not None:
            return stop.signal.name
        limit = self.walltime
        if limit is not None and limit.is_up(look_is_near=self._look_is_due(step + 1)):
            return f"--max_walltime={limit.limit_sec:.0f} s"
        return ""

    def look(self, step: int, state: TrainState) -> None:
        if not self._look_is_due(step):
            return
        self.report.flush()
        began = time.monotonic()
        if self._is_due(step, self.config.train.eval_every):
            self.report.validation(step, self.hooks.validate(state))
        if step and self._is_due(step, self.config.evaluate.every):
            self.hooks.sample(step, state)
            self.report.meter.reset()
        self.measured("look", time.monotonic() - began)

    def save(self, step: int, state: TrainState, wait: bool) -> None:
        """Saves the state, and waits for the checkpoint if `wait` or the time limit needs it."""
        began = time.monotonic()
        self.hooks.save(step, state)
        # A time limit has to know how long a save takes, so the loop waits for the first save.
        if wait or (self.walltime is not None and not self.walltime.knows_save):
            self.hooks.finish_saving()
            self.measured("save", time.monotonic() - began)

    def _look_is_due(self, step: int) -> bool:
        intervals = (self.config.train.eval_every, self.config.evaluate.every)
        return any(self._is_due(step, every) for every in intervals)

    def _is_due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.config.train.steps)
