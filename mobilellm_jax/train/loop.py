"""Runs the training loop on the host: feeds batches, reads metrics, saves, evaluates and stops.

The loop reads the metrics of a step while the next step runs. `prefetch.py` places batches on the
devices before their steps begin. A batch that no step used has no effect on a resumed run, because
the step number alone determines the next batch.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping

import jax
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

    put: Callable[[Mapping[str, np.ndarray]], Batch]  # Turns rows of this host into global arrays.
    # Starts a save; may return before the checkpoint is complete.
    save: Callable[[int, TrainState], None]
    # Waits until the checkpoint is complete; raises errors of the save.
    finish_saving: Callable[[], None]
    validate: Callable[[TrainState], Mapping[str, float]]  # Returns the validation metrics.
    sample: Callable[[int, TrainState], None]  # Writes samples and scores of the model.
    # Returns whether a save failed and has to be repeated now; all processes get the same value.
    retry_is_due: Callable[[], bool] = lambda: False
    # Receives whether this process wants to stop, and returns whether all processes stop.
    agree: Callable[[bool], bool] = lambda asked: asked


def train_loop(
    config: Config,
    state: TrainState,
    step_fn: TrainStep,
    batches: Iterator[Mapping[str, np.ndarray]],
    hooks: Hooks,
    writer: MetricsWriter,
    walltime: Walltime,
) -> tuple[TrainState, range]:
    """Trains from `state.step` to `train.steps`; returns the last state and the bad steps.

    If the run diverged, the bad steps are its last steps, whose loss or gradient was not finite.
    Otherwise there are no bad steps.
    If a signal arrived or `walltime` is up, the loop saves at the end of the step and stops. With
    several processes, all of them save and stop one step later. Until the first step has been
    compiled, the caller handles signals. A run diverges if its last `train.max_bad_steps` steps
    were not finite. The loop always saves the last state, unless the run diverged. It saves no
    other state after a step that was not finite, because a run could not recover from a damaged
    state. If an error ends the loop, it also saves the last state, if it can.
    """
    watch = _Watch(config, hooks, Reporter(config, writer), writer, walltime)
    try:
        return _take_steps(config, state, step_fn, batches, watch)
    except Exception:
        watch.rescue()
        raise


def _take_steps(
    config: Config,
    state: TrainState,
    step_fn: TrainStep,
    batches: Iterator[Mapping[str, np.ndarray]],
    watch: "_Watch",
) -> tuple[TrainState, range]:
    train, first, steps = config.train, int(state.step), config.train.steps
    hooks, report, stop = watch.hooks, watch.report, StopRequest()
    # The loop first evaluates the given state, because an earlier process may have saved the state
    # and ended before the evaluation. The loop saves each state before its evaluation, so that an
    # evaluation that crashes the process loses no training.
    watch.look(first, state)
    with contextlib.ExitStack() as stack:
        placed = stack.enter_context(contextlib.closing(prefetch(batches, hooks.put)))
        report.meter.reset()
        for step in range(first + 1, steps + 1):
            began = time.monotonic()
            batch = report.meter.wait_for(placed)
            if step == first + 1:
                watch.compiling("the training step")
            state, metrics = step_fn(state, batch)
            watch.newest = state
            if step == first + 1:
                # `stop` handles signals from here on. Until here there was nothing to save, and the
                # first step may have compiled for minutes.
                stack.enter_context(stop)
            report.step(step, metrics)
            if step > first + 1:  # The time of the first step includes compilation.
                watch.walltime.measured("step", time.monotonic() - began)
            why = watch.reason_to_stop(step, stop)
            stopping = hooks.agree(bool(why)) and step < steps
            last = stopping or step == steps
            due = last or step % train.checkpoint_every == 0 or hooks.retry_is_due()
            if due:
                report.flush()
            if report.diverged:
                return state, report.bad
            if last or (due and not report.bad):
                if stopping:
                    why = why or "another process"
                    watch.writer.message(f"step {step}: stopping ({why}); saving, then leaving")
                watch.save(step, state, wait=last)
            if stopping:
                break
            watch.look(step, state)
    return state, range(0)


@dataclasses.dataclass
class _Watch:
    """Saves and evaluates the run, and measures durations for the time limit."""

    config: Config
    hooks: Hooks
    report: Reporter
    writer: MetricsWriter
    walltime: Walltime
    newest: TrainState | None = None  # State after the last step; None before the first step.
    is_saving: bool = False  # Whether a save has begun and not returned.
    # Programs that a "compiling" message has named.
    compiled: set[str] = dataclasses.field(default_factory=set)

    def reason_to_stop(self, step: int, stop: StopRequest) -> str:
        if stop.signal is not None:
            return stop.signal.name
        if self.walltime.is_up(look_is_near=self._look_is_due(step + 1)):
            return f"--max_walltime={self.walltime.limit_sec:.0f} s"
        return ""

    def compiling(self, what: str) -> None:
        """Tells the user, before the first use of `what`, that its compilation begins."""
        if what not in self.compiled:
            self.compiled.add(what)
            self.writer.message(f"compiling {what} ...")

    def look(self, step: int, state: TrainState) -> None:
        if not self._look_is_due(step):
            return
        self.report.flush()
        began = time.monotonic()
        side = self.writer.side
        if self._is_due(step, self.config.train.eval_every):
            self.compiling("the validation")
            with side.attempt_together(f"the validation at step {step}"):
                self.writer.evaluation(step, self.hooks.validate(state), "validation ")
        if step and self._is_due(step, self.config.evaluate.every):
            self.compiling("the samples and scores")
            with side.attempt_together(f"the samples and scores at step {step}"):
                self.hooks.sample(step, state)
        self.report.meter.reset()  # Training rates do not include the time of evaluations.
        self.walltime.measured("look", time.monotonic() - began)

    def save(self, step: int, state: TrainState, wait: bool) -> None:
        """Saves the state.

        Waits for the save if `wait` is set, or if `walltime` needs its duration.
        """
        began = time.monotonic()
        self.is_saving = True
        self.hooks.save(step, state)
        if wait or self.walltime.needs_a_save:
            self.hooks.finish_saving()
            self.walltime.measured("save", time.monotonic() - began)
        self.is_saving = False

    def rescue(self) -> None:
        """Saves the newest state after an error, if a single process can save it.

        Several processes can only save together, and the others do not know of the error. An error
        of a save is not tried again. A step that failed has freed the memory of the state.
        """
        state = self.newest
        if state is None or self.is_saving or jax.process_count() > 1:
            return
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            return
        with self.writer.side.attempt("saving the last state after an error"):
            if not int(state.bad_steps):
                self.save(int(state.step), state, wait=True)
                self.writer.message(f"step {int(state.step)}: saved, because an error ends the run")

    def _look_is_due(self, step: int) -> bool:
        intervals = (self.config.train.eval_every, self.config.evaluate.every)
        return any(self._is_due(step, every) for every in intervals)

    def _is_due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.config.train.steps)
