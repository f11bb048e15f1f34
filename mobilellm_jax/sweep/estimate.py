"""Estimates the time of a sweep from a short trial of every model, or from a stated throughput."""

import concurrent.futures
import dataclasses
import json
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mobilellm_jax.config import Config
from mobilellm_jax.model.size import flops_per_token, parameter_count
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.sweep.folder import TRIALS
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.sweep.slots import Slot

_FORWARD = 1 / 3  # an evaluation takes this share of the time of a training step per token
_START_SEC = 10.0  # start of a process, if no trial has measured it

Say = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of one model on this machine."""

    step_sec: float
    start_sec: float  # from the start of the process to the end of its first step

    def seconds(self, config: Config, validation_batches: int) -> float:
        """Returns the seconds of a run; each evaluation has `validation_batches` batches."""
        train = config.train
        evaluations = 1 + -(-train.steps // train.eval_every) if train.eval_every else 0
        looks = evaluations * validation_batches * _FORWARD
        return self.start_sec + (train.steps + looks) * self.step_sec


def speed_of(config: Config, flops_per_sec: float) -> Speed:
    """Returns the speed at a stated throughput in model FLOPs per second."""
    tokens = config.train.global_batch * config.data.seq_len
    flops = flops_per_token(config.model, config.data.seq_len) * tokens
    return Speed(flops / flops_per_sec, _START_SEC)


def try_all(sweep: Path, runs: Sequence[Run], slots: Sequence[Slot], say: Say) -> dict[str, Speed]:
    """Returns measured speeds by `key_of`, with as many trials at once as the sweep has slots.

    Earlier measurements are read from `trials.json` and are not repeated. A trial fills the compile
    cache, so the runs of its model start faster. The result has no entry for a trial that failed;
    the log of the run will show the error.
    """
    known = _read(sweep / TRIALS)
    missing = {key_of(run): run for run in runs if key_of(run) not in known}
    if not missing:
        return known
    say(f"trying {len(missing)} models for some steps each, to tell how long they take ...")
    free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)

    def measure(run: Run) -> Speed | None:
        slot = free.get()
        try:
            return _try(sweep, run, slot)
        finally:
            free.put(slot)

    with concurrent.futures.ThreadPoolExecutor(len(slots)) as pool:
        tried = zip(missing, pool.map(measure, missing.values()), strict=True)
        for number, (key, speed) in enumerate(tried, start=1):
            if speed is None:
                say(f"  {number}/{len(missing)} {missing[key].name}: the trial failed")
                continue
            known[key] = speed
            text = json.dumps({k: dataclasses.asdict(s) for k, s in known.items()}, indent=1)
            rundir.write_whole(sweep / TRIALS, text + "\n")
            say(f"  {number}/{len(missing)} {missing[key].name}: {speed.step_sec:.3f} s a step")
    return known


def key_of(run: Run) -> str:
    """Returns a key of all settings that the time of a trial depends on."""
    config = run.config
    model = dataclasses.astuple(config.model)
    shape = (config.train.global_batch, config.train.accumulation_steps, config.data.seq_len)
    quantized = (config.quantize.scheme, config.quantize.parts)
    return json.dumps([*model, *shape, config.data.boundaries, config.optimizer.name, *quantized])


def plan_lines(runs: Sequence[Run]) -> list[str]:
    """Returns a line per model with its runs, parameters, tokens and FLOPs.

    The runs of a model differ in seeds and learning rates and share one line.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_without_seed(run), []).append(run)
    width = max(len(name) for name in groups)
    lines = [f"{'model':{width}} {'runs':>5} {'parameters':>14} {'tokens':>16} {'PFLOP, all':>12}"]
    for name, members in groups.items():
        config = members[0].config
        tokens = config.train.steps * config.train.global_batch * config.data.seq_len
        flops = sum(run.flops for run in members) / 1e15
        lines.append(
            f"{name:{width}} {len(members):5} {parameter_count(config.model):14,} {tokens:16,} "
            f"{flops:12,.3f}"
        )
    return lines


def _without_seed(run: Run) -> str:
    name = run.name.rpartition("-s")[0]
    return name.rpartition("-lr")[0] or name


def _try(sweep: Path, run: Run, slot: Slot) -> Speed | None:
    command = [sys.executable, "-m", "mobilellm_jax.sweep.child", "trial", str(sweep), run.name]
    result = subprocess.run(
        [*command, *slot.arguments],
        env=child_environment(slot),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        return None
    answer = strict_json.parse(result.stdout.splitlines()[-1])
    return Speed(
        step_sec=strict_json.get(answer, "step_sec", float),
        start_sec=strict_json.get(answer, "start_sec", float),
    )


def child_environment(slot: Slot) -> dict[str, str]:
    """Returns the environment of a child in this slot; the child imports the same package."""
    import os

    import mobilellm_jax

    root = str(Path(mobilellm_jax.__file__).parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    # A child trains as a single process, even if its parent was started with settings for several
    # processes.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **slot.environment}


def _read(file: Path) -> dict[str, Speed]:
    found = strict_json.read(file) if file.exists() else {}
    return {key: strict_json.as_type(value, Speed, key) for key, value in found.items()}
