"""Computes the cost of a sweep on TPUs by compiling each model's step for an absent TPU slice.

The table has two prices. The first price assumes a model FLOPs utilization (MFU). The second price
uses libtpu's estimate for the compiled step (`plan/prediction.py`). Both prices are predictions,
not measurements.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from mobilellm_jax.config import Config, to_json
from mobilellm_jax.model.on_device import settle
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.plan.compiled import CompiledStep, compile_step
from mobilellm_jax.plan.fit import smallest_fit, written
from mobilellm_jax.plan.prediction import predict
from mobilellm_jax.plan.topology import Topology, topology_devices
from mobilellm_jax.processes.source_digest import source_digest
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.train.metrics import peak_flops
from mobilellm_jax.train.state import mesh_of

Say = Callable[[str], object]
_GIB = 2**30
# The compiled step depends on the config, on this source code, and on the versions of these
# libraries.
_ROOMS = ("model", "quantize", "train", "plan", "sharding.py")
_LIBRARIES = ("jax", "flax", "optax", "libtpu")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's results for one step."""

    change: str  # change of the config that made the step fit; "": it fits unchanged
    peak_bytes: int  # per chip; 0: no change made the step fit
    step_sec: float  # prediction with no communication hidden
    flops_sec: float  # time of a step's model FLOPs at the peak of the chips
    compile_sec: float


@dataclasses.dataclass(frozen=True)
class Price:
    """The price of one model, for all its runs."""

    name: str
    runs: int
    parameters: int
    steps: int
    compiled: Compiled
    num_chips: int

    def stated(self, utilization: float) -> float:
        """Returns the chip-hours of all runs at an assumed MFU."""
        return self._chip_hours(self.compiled.flops_sec / utilization)

    @property
    def predicted(self) -> float:
        """Returns the chip-hours of all runs with libtpu's estimate of the step."""
        return self._chip_hours(self.compiled.step_sec)

    def _chip_hours(self, step_sec: float) -> float:
        return step_sec * self.steps * self.num_chips * self.runs / 3600


def price_all(runs: Sequence[Run], topology: Topology, kept: Path, say: Say) -> list[Price]:
    """Compiles the step of every model once and returns the prices.

    Args:
      runs: the runs of the sweep. Runs that differ only in seeds, length or learning rate share one
        compiled step.
      topology: the TPU slice to compile for.
      kept: a file with the results of earlier compilations. A step is compiled again only if the
        code or a library changed. The function saves this file after each compilation.
      say: receives one line per model.

    Raises:
      ConfigError: if libtpu is missing, or if a model cannot be divided over the slice.
    """
    devices = topology_devices(topology)
    found = strict_json.read(kept) if kept.exists() else {}
    known = {key: strict_json.as_type(value, Compiled, key) for key, value in found.items()}
    models: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        models.setdefault((_key(run.config, topology), run.config.train.steps), []).append(run)
    prices = []
    for number, ((key, steps), members) in enumerate(models.items(), start=1):
        name = members[0].name.rpartition("-s")[0]
        if key not in known:
            known[key] = _compile(members[0].config, topology, devices)
            text = json.dumps({k: dataclasses.asdict(c) for k, c in known.items()}, indent=1)
            rundir.write_whole(kept, text + "\n")
        compiled = known[key]
        say(
            f"  {number}/{len(models)} {name}: {compiled.peak_bytes / _GIB:.1f} GiB, compiled in "
            f"{compiled.compile_sec:.0f} s"
        )
        prices.append(
            Price(
                name=name,
                runs=len(members),
                parameters=parameter_count(members[0].config.model),
                steps=steps,
                compiled=compiled,
                num_chips=topology.num_devices,
            )
        )
    return prices


def price_table(prices: Sequence[Price], topology: Topology, utilization: float) -> list[str]:
    """Returns the prices as lines of a Markdown table, followed by the assumptions."""
    lines = [
        "| model | runs | parameters | steps | change to fit | peak GiB | predicted MFU "
        f"| chip-hours at MFU {utilization:.0%} | chip-hours, predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for price in prices:
        compiled = price.compiled
        numbers = "| does not fit | | | |"
        if compiled.peak_bytes:
            mfu = compiled.flops_sec / compiled.step_sec
            numbers = (
                f"| {compiled.peak_bytes / _GIB:.1f} | {mfu:.0%} "
                f"| {price.stated(utilization):,.0f} | {price.predicted:,.0f} |"
            )
        lines.append(
            f"| {price.name} | {price.runs} | {price.parameters:,} | {price.steps:,} | "
            f"{compiled.change or 'none'} {numbers}"
        )
    fitting = [price for price in prices if price.compiled.peak_bytes]
    stated = sum(price.stated(utilization) for price in fitting)
    predicted = sum(price.predicted for price in fitting)
    lines.append(
        f"| all | {sum(p.runs for p in fitting)} | | | | | | {stated:,.0f} | {predicted:,.0f} |"
    )
    lines += [
        "",
        f"For {topology.name} ({topology.num_devices} chips), which is not here: nothing was "
        f"measured. {utilization:.0%} of the dense bfloat16 peak is an assumption (--mfu); the "
        "prediction is libtpu's estimate of the compiled step with no communication hidden. Model "
        "FLOPs as everywhere in this project; evaluation, saving and restarts are not counted.",
    ]
    return lines


def _compile(config: Config, topology: Topology, devices: list[object]) -> Compiled:
    peak = peak_flops(devices[0])
    assert peak is not None, "the peak of every chip is known"
    config = settle(config, devices[0])
    step = compile_step(config, *mesh_of(config, devices))
    compile_sec, change = step.compile_sec, ""
    if not isinstance(step, CompiledStep):
        fit = smallest_fit(config, devices, step)
        if fit is None:
            return Compiled("", 0, 0.0, 0.0, compile_sec)
        config, step, change = fit.config, fit.step, written(fit.change)
        compile_sec += step.compile_sec
    account = account_of(config, *mesh_of(config, devices))
    prediction = predict(config, account, step, topology.chip, peak)
    return Compiled(
        change=change,
        peak_bytes=step.peak_bytes,
        step_sec=prediction.slowest_sec,
        flops_sec=prediction.flops_sec,
        compile_sec=compile_sec,
    )


def _key(config: Config, topology: Topology) -> str:
    """Returns a name for everything that determines the compiled step.

    Seeds, the number of steps and learning rates do not change the compiled step, so the name
    ignores them.
    """
    neutral = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=480_000, seed=0),
        data=dataclasses.replace(config.data, seed=0, path=""),
        optimizer=dataclasses.replace(config.optimizer, peak_lr=1e-3, warmup_steps=1),
    )
    text = f"{topology.name} {to_json(neutral)} {_code()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _code() -> str:
    """Returns a digest of the source code and the versions of the libraries."""
    return " ".join([source_digest(_ROOMS), *map(_version, _LIBRARIES)])


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # a TPU machine can have libtpu without package metadata
        return "unknown"
