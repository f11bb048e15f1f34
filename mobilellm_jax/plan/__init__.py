"""Predicts the needs of a run before it starts, by formulas or from the compiled training step.

`accounting` counts parameters, FLOPs and bytes. `topology` describes TPU slices, also absent ones.
`compiled` compiles the training step for a slice, and `hlo` reads the compiled program.
`prediction` estimates the time of a step. `fit` searches for the smallest change that makes a step
fit. `report` formats the results.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import jax

from mobilellm_jax.config import Config
from mobilellm_jax.model.on_device import settle
from mobilellm_jax.plan import report
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.plan.compiled import CompiledStep, compile_step
from mobilellm_jax.plan.fit import smallest_fit, written
from mobilellm_jax.plan.prediction import predict
from mobilellm_jax.plan.topology import Topology, parse_topology, topology_devices
from mobilellm_jax.train.metrics import peak_flops
from mobilellm_jax.train.state import mesh_of

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Section:
    """Lines of a plan. The last section says whether the run fits."""

    lines: list[str]
    fits: bool = True


def plan(config: Config, topology_name: str | None) -> Iterator[Section]:
    """Yields the plan, each section as soon as it is known.

    Args:
      config: the config of the run.
      topology_name: TPU slices to compile the step for, in the form of `parse_topology`; None: the
        devices of this machine, without compiling.

    Raises:
      ConfigError: if there is no such topology, or if its devices cannot run the config.
    """
    topology = parse_topology(topology_name) if topology_name else None
    devices = topology_devices(topology) if topology else jax.devices()
    config = settle(config, devices[0])
    yield _counted(config, devices)
    if topology is None:
        hint = "not compiled; --topology=v5e:16x16 compiles the step for such a slice of TPUs"
        yield Section([hint])
        return
    _log.info(f"compiling the step for {topology.name} ...")
    step = compile_step(config, *mesh_of(config, devices))
    if isinstance(step, CompiledStep):
        yield _predicted(config, topology, devices, step)
        return
    yield Section(report.too_large_lines(step))
    fit = smallest_fit(config, devices, step)
    if fit is None:
        failure = "no change of remat, accumulation or fsdp makes it fit; take a larger slice"
        yield Section([failure], fits=False)
        return
    yield Section([f"smallest change that fits: {written(fit.change)}"])
    yield _counted(fit.config, devices)
    yield _predicted(fit.config, topology, devices, fit.step)


def _counted(config: Config, devices: Sequence[jax.Device]) -> Section:
    mesh, rules = mesh_of(config, devices)
    account = account_of(config, mesh, rules)
    return Section(report.account_lines(config, account, dict(mesh.shape)))


def _predicted(
    config: Config, topology: Topology, devices: Sequence[jax.Device], step: CompiledStep
) -> Section:
    chip, peak = topology.chip, peak_flops(devices[0])
    assert peak is not None, "the table of peaks has every chip of a topology"
    account = account_of(config, *mesh_of(config, devices))
    prediction = predict(config, account, step, chip, peak)
    cycles = step.program.estimated_cycles
    return Section(
        report.step_lines(step, chip.memory_bytes)
        + report.prediction_lines(account, prediction, chip.name, cycles)
    )
