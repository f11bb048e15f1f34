"""Estimates the time of a sweep from a short trial of every model, or from a stated throughput."""

import concurrent.futures
import dataclasses
import json
import logging
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.model.size import flops_per_token, parameter_count
from mobilellm_jax.startup.messages import counted
from mobilellm_jax.storage import strict_json
from mobilellm_jax.sweep import folder as files
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.sweep.slots import Slot

_log = logging.getLogger(__name__)
_FORWARD = 1 / 3  # Time per token in evaluation, divided by the time per token in training.
_START_SEC = 10.0  # Assumed `start_sec` of a model without a trial.


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of one model on this machine."""

    step_sec: float
    start_sec: float  # Time from the start of the process to the end of its first step.

    def seconds(self, config: Config, validation_batches: int) -> float:
        """Returns the seconds of a run; each evaluation reads `validation_batches` batches."""
        train = config.train
        evaluations = 1 + -(-train.steps // train.eval_every) if train.eval_every else 0
        looks = evaluations * validation_batches * _FORWARD
        return self.start_sec + (train.steps + looks) * self.step_sec


def speed_of(config: Config, flops_per_sec: float) -> Speed:
    """Returns the speed of a model at a throughput of `flops_per_sec` model FLOPs per second."""
    flops = flops_per_token(config.model, config.data.seq_len) * config.tokens_per_step
    return Speed(flops / flops_per_sec, _START_SEC)


def try_all(sweep: Path, runs: Sequence[Run], slots: Sequence[Slot]) -> dict[str, Speed]:
    """Measures the speed of each model in a trial; returns the speeds by `key_of`.

    Each slot runs one trial at a time. The function reads earlier measurements from `trials.json`
    and does not repeat them. A trial also fills the compile cache, so the runs of its model start
    faster. The result has no entry for a model whose trial failed; the log of its run will later
    show the error.

    Raises:
      ConfigError: if the settings of a model do not fit this machine, for example its memory.
    """
    stored = files.read_results(sweep / files.TRIALS, Speed)
    # The speed belongs to this machine, and to a slot of this size.
    place = f"{socket.gethostname()} / {len(slots)}: "
    known = {
        key.removeprefix(place): speed for key, speed in stored.items() if key.startswith(place)
    }
    missing = {key_of(run): run for run in runs if key_of(run) not in known}
    if not missing:
        return known
    _log.info(f"trying {counted(len(missing), 'model')} for some steps, to estimate the time ...")
    free = list(slots)
    nothing = subprocess.DEVNULL
    pipes = {"stdin": nothing, "stdout": subprocess.PIPE, "stderr": nothing}

    def measure(run: Run) -> Speed | None:
        slot = free.pop()  # A slot is free, because there are as many slots as threads.
        try:
            process = slot.start("trial", sweep, run.name, **pipes)
            output, _ = process.communicate()
        finally:
            free.append(slot)
        if process.returncode:
            return None
        found = strict_json.parse(output.splitlines()[-1])
        if "refused" in found:
            raise ConfigError(f"{run.name}: {strict_json.get(found, 'refused', str)}")
        speed: Speed = strict_json.as_type(found, Speed)
        return speed

    with concurrent.futures.ThreadPoolExecutor(len(slots)) as pool:
        tried = zip(missing.items(), pool.map(measure, missing.values()), strict=True)
        for number, ((key, run), speed) in enumerate(tried, start=1):
            result = "the trial failed"
            if speed is not None:
                known[key] = stored[place + key] = speed
                files.write_results(sweep / files.TRIALS, stored)
                result = f"{speed.step_sec:.3f} s a step"
            _log.info(f"  {number}/{len(missing)} {run.name}: {result}")
    return known


def key_of(run: Run) -> str:
    """Returns a key that contains all settings that affect the speed of a model."""
    config = run.config
    model = dataclasses.astuple(config.model)
    shape = (config.train.global_batch, config.train.accumulation_steps, config.data.seq_len)
    quantized = (config.quantize.scheme, config.quantize.parts)
    return json.dumps([*model, *shape, config.data.boundaries, config.optimizer.name, *quantized])


def expected_seconds(
    runs: Sequence[Run], speeds: Mapping[str, Speed], batches: Mapping[str, int]
) -> dict[str, float]:
    """Returns the expected seconds of each run, by the name of the run.

    `speeds` maps the key of a run (`key_of`) to a speed. `batches` maps the name of a run to its
    number of batches per evaluation. If the trial of a model failed, the time of its runs is
    their FLOPs divided by the mean throughput of the other runs.
    """
    known = {
        run.name: speeds[key].seconds(run.config, batches[run.name])
        for run in runs
        if (key := key_of(run)) in speeds
    }
    flops = sum(run.flops for run in runs if run.name in known)
    per_flop = sum(known.values()) / flops if flops else 1e-10
    return {run.name: known.get(run.name, run.flops * per_flop) for run in runs}


def seconds_ahead(sweep: Path, runs: Sequence[Run], expected_sec: Mapping[str, float]) -> float:
    """Returns the expected seconds of all steps that the runs still have to take."""
    return sum(expected_sec[run.name] * (1 - share_done(sweep, run)) for run in runs)


def share_done(sweep: Path, run: Run) -> float:
    """Returns the share of its steps that a run has recorded; 0 if its records cannot be read."""
    return (files.last_value(sweep, run, "step") or 0) / run.config.train.steps


class Pace:
    """Estimates the rest of a sweep from the expected times and from the times that runs took.

    The class uses the time of a run that has ended, or has taken a fifth of its steps since it was
    started. Before that, compilation takes most of the time. As long as there is no such run, the
    estimate uses only the expected times.
    """

    _ENOUGH = 0.2

    def __init__(self, sweep: Path, expected_sec: Mapping[str, float], slots: int) -> None:
        self._sweep, self._expected_sec, self._slots = sweep, expected_sec, slots
        self._took, self._expected = 0.0, 0.0

    def ended(self, run: Run, seconds: float, share: float) -> None:
        """Adds a run that took `seconds` for this share of its steps."""
        self._took += seconds
        self._expected += share * self._expected_sec[run.name]

    def seconds_left(
        self, waiting: Sequence[Run], running: Sequence[tuple[Run, float, float]]
    ) -> float:
        """Returns the estimate.

        Each entry of `running` has a run, the seconds since its start, and the share of its steps
        that it had taken before this start.
        """
        took, expected = self._took, self._expected
        for run, seconds, first in running:
            share = share_done(self._sweep, run) - first
            if share >= self._ENOUGH:
                took += seconds
                expected += share * self._expected_sec[run.name]
        left = [*waiting, *(run for run, _, _ in running)]
        ahead = seconds_ahead(self._sweep, left, self._expected_sec)
        pace = took / expected if expected else 1.0
        return pace * ahead / max(1, min(self._slots, len(left)))


def in_words(seconds: float) -> str:
    """Returns a duration as text, such as "50 s", "12 min" or "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def flops_in_words(flops: float) -> str:
    """Returns a number of FLOPs with three digits and a unit, such as "3.21 TFLOP"."""
    units = {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9}
    unit = next((unit for unit, size in units.items() if flops >= size), "GFLOP")
    value = flops / units[unit]
    return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def plan_lines(runs: Sequence[Run]) -> list[str]:
    """Returns a table with one line per model.

    A line covers the runs of all seeds and learning rates.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.model, []).append(run)
    width = max(len(name) for name in groups)
    lines = [f"{'model':{width}} {'runs':>5} {'parameters':>14} {'tokens':>16} {'FLOPs, all':>14}"]
    for name, members in groups.items():
        run, flops = members[0], sum(run.flops for run in members)
        lines.append(
            f"{name:{width}} {len(members):5} {parameter_count(run.config.model):14,} "
            f"{run.config.tokens:16,} {flops_in_words(flops):>14}"
        )
    return lines
