"""What a run will need, before it runs: counted by formula, or read off the compiled step.

`accounting` counts parameters, FLOPs and bytes; `topology` names TPU slices that need not be there;
`compiled` compiles the real training step for one and reads what it does (`hlo`); `prediction`
makes a time of that; `fit` looks for the smallest change that makes it fit; `report` puts it all
into words.
"""

from collections.abc import Callable

import jax

from mobilellm_jax.config import Config
from mobilellm_jax.plan import report
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.plan.compiled import CompiledStep, compile_step, mesh_of, settle
from mobilellm_jax.plan.fit import smallest_fit, written
from mobilellm_jax.plan.prediction import predict
from mobilellm_jax.plan.topology import parse_topology, topology_devices
from mobilellm_jax.train.metrics import peak_flops

Say = Callable[[str], object]


def plan(config: Config, topology_name: str | None, say: Say, progress: Say) -> bool:
    """Says what the run needs; with a topology, by compiling its step.

    Args:
      config: of the run.
      topology_name: of TPU slices, as `parse_topology` reads it; None: this machine, not compiled.
      say: given the lines of the plan, as they become known.
      progress: given what is being done meanwhile.

    Returns:
      Whether it fits, as it is or with the change that was named; True if nothing was compiled.

    Raises:
      ConfigError: for a topology that cannot be, and for a config that its devices cannot run.
    """
    topology = parse_topology(topology_name) if topology_name else None
    devices = topology_devices(topology) if topology else jax.devices()
    config = settle(config, devices[0])

    def say_account(config: Config) -> None:
        mesh, rules = mesh_of(config, devices)
        account = account_of(config, mesh, rules)
        for line in report.account_lines(config, account, dict(mesh.shape)):
            say(line)

    def say_step(config: Config, step: CompiledStep) -> None:
        assert topology is not None, "only a topology is compiled for"
        chip, peak = topology.chip, peak_flops(devices[0])
        assert peak is not None, "the peak of every chip is known"
        account = account_of(config, *mesh_of(config, devices))
        prediction = predict(config, account, step, chip, peak)
        cycles = step.program.estimated_cycles
        for line in report.step_lines(step, chip.memory_bytes):
            say(line)
        for line in report.prediction_lines(account, prediction, chip.name, cycles):
            say(line)

    say_account(config)
    if topology is None:
        say("not compiled; --topology=v5e:16x16 compiles the step for such a slice of TPUs")
        return True
    progress(f"compiling the step for {topology.name} ...")
    step = compile_step(config, *mesh_of(config, devices))
    if isinstance(step, CompiledStep):
        say_step(config, step)
        return True
    say(report.too_large_line(step))
    fit = smallest_fit(config, devices, step, lambda text: progress(f"compiling with {text} ..."))
    if fit is None:
        say("no change of remat, accumulation or fsdp makes it fit; take a larger slice")
        return False
    say(f"smallest change that fits: {written(fit.change)}")
    say_account(fit.config)
    say_step(fit.config, fit.step)
    return True
