"""Predicts memory and time of a run, from formulas or from the compiled training step."""

import logging
from collections.abc import Callable

import jax

from mobilellm_jax.config import Config
from mobilellm_jax.model.on_device import settle
from mobilellm_jax.plan import report
from mobilellm_jax.plan.compiled import CompiledStep, compile_step
from mobilellm_jax.plan.fit import smallest_fit, written
from mobilellm_jax.plan.memory import memory_per_device, shortage
from mobilellm_jax.plan.prediction import predict
from mobilellm_jax.plan.topology import parse_topology, topology_devices

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
    show(report.account_lines(config, devices))
    if topology is None:
        missing = shortage(config, devices)
        show(report.fit_lines(missing, memory_per_device(devices)))
        show(["not compiled; --topology=v5e:16x16 compiles the step for such a slice of TPUs"])
        return missing is None or missing.change is not None
    _log.info(f"compiling the step for {topology.name} ...")
    step = compile_step(config, devices)
    if not isinstance(step, CompiledStep):
        show(report.too_large_lines(step))
        fit = smallest_fit(config, devices, step)
        if fit is None:
            show(["no change of remat, accumulation or fsdp makes it fit; take a larger slice"])
            return False
        config, step = fit.config, fit.step
        show([f"smallest change that fits: {written(fit.change)}"])
        show(report.account_lines(config, devices))
    prediction = predict(config, step, topology.chip, devices)
    show(report.step_lines(config, step, prediction, topology.chip))
    return True
