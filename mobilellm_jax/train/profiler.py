"""Records a profile of a few steps: the work of the devices over time, and their memory.

TensorBoard with the plugin `xprof` shows `RUN/profile/` (`tensorboard --logdir=RUN`). The same
folder holds the memory profile, a pprof file (`pprof -top RUN/profile/memory-step-N.prof`).
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from mobilellm_jax.config import ConfigError
from mobilellm_jax.train.side_records import SideRecords
from mobilellm_jax.train.state import TrainState
from mobilellm_jax.train.step import Batch, StepMetrics, TrainStep

_PROFILE = "writing the profile"


@dataclasses.dataclass(frozen=True)
class ProfiledSteps:
    """A range of steps that includes both ends; the first step of a run is step 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "ProfiledSteps":
        """Reads "a:b", or "a" for a single step; other text raises a `ConfigError`."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        if match is None:
            raise ConfigError(
                f"--profile_steps={text} must be FIRST:LAST, both included, such as 10:12."
            )
        steps = cls(int(match[1]), int(match[2] or match[1]))
        if steps.first < 1 or steps.last < steps.first:
            raise ConfigError(
                f"--profile_steps={text} must go forward from step 1 on; steps 10 to 12 are 10:12."
            )
        return steps

    def check(self, first_step: int, last_step: int) -> None:
        """Raises a `ConfigError` if a run from `first_step` does not take all these steps."""
        if self.first <= first_step or self.last > last_step:
            raise ConfigError(
                f"--profile_steps={self.first}:{self.last} must lie within the steps that the run "
                f"still takes, {first_step + 1} to {last_step}."
            )


@contextlib.contextmanager
def profiled(
    step_fn: TrainStep, steps: ProfiledSteps, first_step: int, folder: Path, side: SideRecords
) -> Iterator[TrainStep]:
    """Yields a training step that calls `step_fn`, and records a profile of some calls.

    The step waits for the devices before the first and after the last profiled step, so that the
    trace holds exactly the profiled steps. If the run ends earlier, the profile is kept.
    """
    number = first_step

    def save_memory() -> None:
        jax.profiler.save_device_memory_profile(folder / f"memory-step-{number}.prof")

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        nonlocal number
        number += 1
        if number == steps.first:
            jax.block_until_ready(state)
            with side.attempt(_PROFILE):
                recording.callback(save_memory)
                recording.enter_context(jax.profiler.trace(folder))
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state, metrics = step_fn(state, batch)
        if number == steps.last:
            jax.block_until_ready(state)
            with side.attempt(_PROFILE):
                recording.close()
        return state, metrics

    recording = contextlib.ExitStack()
    try:
        yield step
    finally:
        with side.attempt(_PROFILE):
            recording.close()
