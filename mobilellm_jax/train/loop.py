"""The host's side of training: feed batches, read metrics one step late, save, look, stop.

Batches are placed ahead of the step (`prefetch.py`). One that was placed and not used leaves no
trace: where a run stands in its data follows from its step.

What a run reads and where it saves is handed in (`Hooks`), so this file knows neither data formats
nor checkpoints.
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
from mobilellm_jax.train.report import BadSteps, Reporter
from mobilellm_jax.train.state import TrainState
from mobilellm_jax.train.step import Batch, TrainStep
from mobilellm_jax.train.stopping import StopRequest, Walltime


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls; steps are numbers of completed optimizer steps."""

    put: Callable[[Mapping[str, np.ndarray]], Batch]  # rows of this host -> global arrays
    save: Callable[[int, TrainState], None]  # may return before all is written
    finish_saving: Callable[[], None]  # waits until it is, and raises what went wrong
    validate: Callable[[TrainState], Mapping[str, float]]
    sample: Callable[[int, TrainState], None]
    # Whether a save that was under way failed and is to be tried again, in all processes alike.
    save_again: Callable[[], bool] = bool
    agree: Callable[[bool], bool] = bool  # whether this process wants to stop -> whether all do


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended; only a finished or stopped run is saved."""

    kind: Literal["finished", "stopped", "diverged"]
    why: str = ""  # it stopped
    bad: BadSteps | None = None  # that it diverged at


def train_loop(
    config: Config,
    state: TrainState,
    step_fn: TrainStep,
    batches: Iterator[Mapping[str, np.ndarray]],
    hooks: Hooks,
    writer: MetricsWriter,
    walltime: Walltime | None = None,
) -> tuple[TrainState, Outcome]:
    """Trains from `state.step` to `train.steps`; returns the state and how it ended.

    It stops early, saved, at the end of the step in which SIGTERM or SIGINT arrived or `walltime`
    was up; where a run is several processes, all stop at the end of the next. Until the first step
    is under way the signals are left to the caller. Where saving and
    evaluation fall on the same step, saving comes first, so that nothing lost by an evaluation is
    lost to the run.

    A run whose last `train.max_bad_steps` steps were not finite ends as diverged. What is saved on
    the way there would be no place to go back to, so nothing is while steps are bad, unless the run
    ends there.
    """
    train, steps = config.train, config.train.steps
    first = int(state.step)
    report = Reporter(config, writer)

    def look_is_due(step: int) -> bool:
        intervals = (train.eval_every, config.evaluate.every)
        return any(every and (step % every == 0 or step == steps) for every in intervals)

    def look(step: int) -> None:
        if not look_is_due(step):
            return
        report.flush()
        began = time.monotonic()
        if train.eval_every and (step % train.eval_every == 0 or step == steps):
            report.validation(step, hooks.validate(state))
        every = config.evaluate.every
        if step and every and (step % every == 0 or step == steps):
            hooks.sample(step, state)
            report.meter.reset()
        if walltime is not None:
            walltime.measured("look", time.monotonic() - began)

    def save(step: int, wait: bool) -> None:
        began = time.monotonic()
        hooks.save(step, state)
        # The first one is waited for where a time limit has to know how long it takes.
        if wait or (walltime is not None and not walltime.knows_save):
            hooks.finish_saving()
            if walltime is not None:
                walltime.measured("save", time.monotonic() - began)

    # The run may have been stopped after saving this step and before looking at it.
    look(first)
    saved, why = first, ""
    stop = StopRequest()
    with contextlib.ExitStack() as stack:
        placed = stack.enter_context(contextlib.closing(prefetch(batches, hooks.put)))
        report.meter.reset()
        for step in range(first + 1, steps + 1):
            began = time.monotonic()
            waiting = time.perf_counter()
            batch = next(placed)
            report.meter.waited_sec += time.perf_counter() - waiting
            state, metrics = step_fn(state, batch)
            if step == first + 1:
                # Not before: it has compiled for minutes maybe, and there was nothing to save.
                stack.enter_context(stop)
            report.step(step, metrics)
            if walltime is not None and step > first + 1:  # the first compiles
                walltime.measured("step", time.monotonic() - began)
            if stop.signal is not None:
                why = stop.signal.name
            elif walltime is not None and walltime.is_up(look_is_due(step + 1)):
                why = f"--max_walltime={walltime.limit_sec:.0f} s"
            stopping = hooks.agree(bool(why)) and step < steps
            last = stopping or step == steps
            due = last or step % train.checkpoint_every == 0 or hooks.save_again()
            if due:
                report.flush()
            if report.diverged:
                return state, Outcome("diverged", bad=report.bad)
            if last or (due and report.bad is None):
                if stopping:
                    why = why or "another process"
                    writer.message(f"step {step}: stopping ({why}); saving, then leaving")
                save(step, wait=last)
                saved = step
            if stopping:
                return state, Outcome("stopped", why)
            look(step)
    assert saved == int(state.step), "the last step is always saved"
    return state, Outcome("finished")
