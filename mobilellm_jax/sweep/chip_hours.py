"""Computes the cost of a sweep on TPUs from the compiled step of each model; needs no TPU.

The table has two prices in chip-hours. The first price assumes a model FLOPs utilization (MFU). The
second price uses libtpu's estimate for the compiled step (`plan/prediction.py`). Both prices are
predictions, not measurements.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax

from mobilellm_jax.config import Config, changed, to_json
from mobilellm_jax.model.on_device import settle
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.plan.compiled import CompiledStep, compile_step
from mobilellm_jax.plan.fit import smallest_fit, written
from mobilellm_jax.plan.prediction import predict
from mobilellm_jax.plan.topology import Topology, parse_topology, topology_devices
from mobilellm_jax.processes.source_digest import source_digest
from mobilellm_jax.storage import rundir
from mobilellm_jax.sweep import folder as files
from mobilellm_jax.sweep.runs import Run

_log = logging.getLogger(__name__)
_GIB = 2**30
# The compiled step depends on the config, on these parts of the code and on these libraries.
_ROOMS = ("model", "quantize", "train", "plan", "sharding.py")
_LIBRARIES = ("jax", "flax", "optax", "libtpu")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's results for one step."""

    change: str  # Change of the config that makes the step fit; "" if it fits unchanged.
    peak_bytes: int  # Peak memory per chip; 0 if no change makes the step fit.
    step_sec: float  # Predicted time if no communication overlaps with arithmetic.
    flops_sec: float  # Time of the step's model FLOPs at the peak rate of the chips.
    compile_sec: float


Models = list[tuple[list[Run], Compiled]]
"""The runs of each model, which share one compiled step, and the results for this step."""


def price(runs: Sequence[Run], sweep: Path, topology_name: str, utilization: float) -> bool:
    """Compiles each model's step; prints and saves its chip-hours; returns whether all steps fit.

    Runs that differ only in seeds, length or learning rate share one compiled step. The function
    saves the result of each compilation in the folder `sweep`. A later call compiles a step again
    only if the code or a library has changed. `utilization` is the assumed MFU of the first
    estimate of chip-hours.

    Raises:
      ConfigError: if there is no such topology, if libtpu is missing, or if a model cannot be
        divided over the slice.
    """
    jax.config.update("jax_platforms", "cpu")  # An attached TPU stays free.
    topology = parse_topology(topology_name)
    sweep.mkdir(parents=True, exist_ok=True)
    name = topology.name.replace(":", "-")
    models = _compile_all(runs, topology, sweep / f"compiled-{name}.json")
    table = _table(models, topology, utilization)
    rundir.write_whole(sweep / f"chip-hours-{name}.md", table)
    print(table, end="")
    return all(compiled.peak_bytes for _, compiled in models)


def _compile_all(runs: Sequence[Run], topology: Topology, kept: Path) -> Models:
    devices = topology_devices(topology)
    known = files.read_results(kept, Compiled)
    models: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        models.setdefault((_key(run.config, topology), run.config.train.steps), []).append(run)
    found: Models = []
    for number, ((key, _), members) in enumerate(models.items(), start=1):
        if key not in known:
            known[key] = _compile(members[0].config, topology, devices)
            files.write_results(kept, known)
        compiled = known[key]
        _log.info(
            f"  {number}/{len(models)} {members[0].model}: {compiled.peak_bytes / _GIB:.1f} "
            f"GiB, compiled in {compiled.compile_sec:.0f} s"
        )
        found.append((members, compiled))
    return found


def _table(models: Models, topology: Topology, utilization: float) -> str:
    """Returns a Markdown table of the prices, and a paragraph about the assumptions."""
    lines = [
        "| model | runs | parameters | steps | change to fit | peak GiB | predicted MFU "
        f"| chip-hours at MFU {utilization:.0%} | chip-hours, predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    all_runs, all_stated, all_predicted = 0, 0.0, 0.0
    for runs, compiled in models:
        config = runs[0].config
        numbers = "| does not fit | | | |"
        if compiled.peak_bytes:
            chip_steps = config.train.steps * topology.num_devices * len(runs)
            stated = compiled.flops_sec / utilization * chip_steps / 3600
            predicted = compiled.step_sec * chip_steps / 3600
            all_runs += len(runs)
            all_stated += stated
            all_predicted += predicted
            numbers = (
                f"| {compiled.peak_bytes / _GIB:.1f} | {compiled.flops_sec / compiled.step_sec:.0%}"
                f" | {stated:,.0f} | {predicted:,.0f} |"
            )
        lines.append(
            f"| {runs[0].model} | {len(runs)} | {parameter_count(config.model):,} "
            f"| {config.train.steps:,} | {compiled.change or 'none'} {numbers}"
        )
    lines += [
        f"| all | {all_runs} | | | | | | {all_stated:,.0f} | {all_predicted:,.0f} |",
        "",
        f"Nothing was measured, because we have no {topology.name} ({topology.num_devices} chips). "
        f"{utilization:.0%} of the dense bfloat16 peak is an assumption (--mfu). The prediction is "
        "libtpu's estimate of the compiled step, and assumes that communication does not overlap "
        "with computation. Only the model's FLOPs are counted, as everywhere in this project. "
        "Evaluation, saving and restarts are not counted.",
    ]
    return "\n".join(lines) + "\n"


def _compile(config: Config, topology: Topology, devices: Sequence[jax.Device]) -> Compiled:
    config = settle(config, devices[0])
    step = compile_step(config, devices)
    compile_sec, change = step.compile_sec, ""
    if not isinstance(step, CompiledStep):
        fit = smallest_fit(config, devices, step)
        if fit is None:
            return Compiled("", 0, 0.0, 0.0, compile_sec)
        config, step, change = fit.config, fit.step, written(fit.change)
        compile_sec += step.compile_sec
    prediction = predict(config, step, topology.chip, devices)
    return Compiled(
        change=change,
        peak_bytes=step.peak_bytes,
        step_sec=prediction.slowest_sec,
        flops_sec=prediction.flops_sec,
        compile_sec=compile_sec,
    )


def _key(config: Config, topology: Topology) -> str:
    """Returns a key of the config and the code, without seeds, steps and learning rates."""
    neutral = {"train.steps": 480_000, "train.seed": 0, "data.seed": 0, "data.path": ""}
    neutral |= {"optimizer.peak_lr": 1e-3, "optimizer.warmup_steps": 1}
    text = f"{topology.name} {to_json(changed(config, neutral))} {_code()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _code() -> str:
    return " ".join([source_digest(_ROOMS), *map(_version, _LIBRARIES)])


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # A TPU machine can have libtpu without metadata.
        return "unknown"
