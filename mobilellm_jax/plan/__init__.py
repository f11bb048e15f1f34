"""Predicts memory and time of a run, from formulas or from the compiled training step."""

import logging
from collections.abc import Callable, Sequence

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


def plan(config: Config, topology_name: str | None, show: Callable[[list[str]], None]) -> bool:
    """Shows each section of the plan when it is ready; returns False if the run does not fit.

    `topology_name` names the TPU slices for which the function compiles the step (see
    `parse_topology`). With None, the function computes the sizes for the devices of this machine,
    and it compiles nothing.

    Raises:
      ConfigError: if there is no such topology, or if its devices cannot run the config.
    """
    topology = parse_topology(topology_name) if topology_name else None
    devices = topology_devices(topology) if topology else jax.devices()
    config = settle(config, devices[0])
    show(_counted(config, devices))
    if topology is None:
        show(["not compiled; --topology=v5e:16x16 compiles the step for such a slice of TPUs"])
        return True
    _log.info(f"compiling the step for {topology.name} ...")
    step = compile_step(config, *mesh_of(config, devices))
    if not isinstance(step, CompiledStep):
        show(report.too_large_lines(step))
        fit = smallest_fit(config, devices, step)
        if fit is None:
            show(["no change of remat, accumulation or fsdp makes it fit; take a larger slice"])
            return False
        config, step = fit.config, fit.step
        show([f"smallest change that fits: {written(fit.change)}"])
        show(_counted(config, devices))
    show(_predicted(config, topology, devices, step))
    return True


def _counted(config: Config, devices: Sequence[jax.Device]) -> list[str]:
    mesh, rules = mesh_of(config, devices)
    return report.account_lines(config, account_of(config, mesh, rules), dict(mesh.shape))


def _predicted(
    config: Config, topology: Topology, devices: Sequence[jax.Device], step: CompiledStep
) -> list[str]:
    chip, peak = topology.chip, peak_flops(devices[0])
    assert peak is not None, "the table of peaks has every chip of a topology"
    account = account_of(config, *mesh_of(config, devices))
    prediction = predict(config, account, step, chip, peak)
    cycles = step.program.estimated_cycles
    return [
        *report.step_lines(step, chip.memory_bytes),
        *report.prediction_lines(account, prediction, chip.name, cycles),
    ]
