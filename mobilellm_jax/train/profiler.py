"""Records a profile of a few steps: the work of the devices over time, and their memory.

TensorBoard with the plugin `xprof` shows `RUN/profile/` (`tensorboard --logdir=RUN`). The same
folder holds the memory profile, a pprof file (`pprof -top RUN/profile/memory-step-N.prof`).
"""

import dataclasses
import re
from pathlib import Path

import jax

from mobilellm_jax.config import ConfigError
from mobilellm_jax.train.state import TrainState
from mobilellm_jax.train.step import Batch, StepMetrics, TrainStep


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


class Profiler:
    """Wraps a training step and records a profile of some calls.

    The profiler waits for the devices before the first and after the last profiled step, so that
    the trace holds exactly the profiled steps. If the run ends earlier, the profile is kept.
    """

    def __init__(
        self, step_fn: TrainStep, steps: ProfiledSteps, first_step: int, folder: Path
    ) -> None:
        self._step_fn, self._steps, self._folder = step_fn, steps, folder
        self._step = first_step
        self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        self._step += 1
        if self._step == self._steps.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
            state, metrics = self._step_fn(state, batch)
        if self._step == self._steps.last:
            jax.block_until_ready(state)
            self._stop()
        return state, metrics

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            memory = self._folder / f"memory-step-{self._step}.prof"
            jax.profiler.save_device_memory_profile(memory)
