"""The smallest change of a config that makes its step fit a device's memory.

Small is what changes least: first `model.remat`, which costs arithmetic, then
`train.accumulation_steps`, which costs smaller batches, then both, then `mesh.fsdp`, which costs
communication. What is named has been compiled; counting only says what is worth compiling.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import jax

from mobilellm_jax.config import Config, ConfigError, Remat
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.plan.compiled import CompiledStep, TooLarge, compile_step, mesh_of

_HOPELESS = 1.1  # times what there is, by the count; it is off by less than that
_MOST_ACCUMULATION = 1024

Change = dict[str, Any]
"""Dotted field -> new value."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A change that fits."""

    change: Change
    config: Config
    step: CompiledStep


def changed(config: Config, change: Change) -> Config:
    """Returns the config with the fields of `change` replaced."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in change.items():
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    return dataclasses.replace(
        config,
        **{g: dataclasses.replace(getattr(config, g), **fields) for g, fields in groups.items()},
    )


def smallest_fit(
    config: Config,
    devices: Sequence[jax.Device],
    failed: TooLarge,
    progress: Callable[[str], object],
) -> Fit | None:
    """Compiles the changes of `candidates` in order until one fits; None if none does.

    Args:
      config: as it was asked for, settled.
      devices: as for `compile_step`.
      failed: what the compiler said of it.
      progress: told each change before it is compiled, which takes up to minutes.
    """
    mesh, rules = mesh_of(config, devices)
    # By how much the count is short: room to work in, mostly.
    missing = failed.needed_bytes - account_of(config, mesh, rules).total_bytes
    for change in candidates(config, len(devices)):
        try:
            candidate = changed(config, change)
            mesh, rules = mesh_of(candidate, devices)
        except ConfigError:
            continue
        expected = account_of(candidate, mesh, rules).total_bytes + max(0, missing)
        if expected > _HOPELESS * failed.available_bytes:
            continue
        progress(written(change))
        step = compile_step(candidate, mesh, rules)
        if isinstance(step, CompiledStep):
            return Fit(change, candidate, step)
    return None


def candidates(config: Config, num_devices: int) -> Iterator[Change]:
    """Yields changes, smallest first; not all of them are allowed."""
    order = [name for name in get_args(Remat) if name != "offload"]
    remats = order[order.index(config.model.remat) + 1 :] if config.model.remat in order else []
    remat_only: list[Change] = [{"model.remat": remat} for remat in remats]
    doubled = itertools.takewhile(
        lambda steps: steps <= min(_MOST_ACCUMULATION, config.train.global_batch),
        (config.train.accumulation_steps * 2**n for n in itertools.count(1)),
    )
    accumulation_only: list[Change] = [{"train.accumulation_steps": steps} for steps in doubled]
    strongest = remat_only[-1] if remat_only else {}
    on_this_mesh = [*remat_only, *accumulation_only]
    if strongest:
        on_this_mesh += [strongest | accumulation for accumulation in accumulation_only]
    yield from on_this_mesh
    for fsdp in range(config.mesh.fsdp + 1, num_devices + 1):
        if config.mesh.fsdp < 1 or num_devices % fsdp:
            continue
        split: Change = {"mesh.fsdp": fsdp}
        if config.mesh.data != -1:
            split["mesh.data"] = -1
        yield split
        yield from (split | change for change in on_this_mesh)


def written(change: Change) -> str:
    """Returns the change as flags."""
    return " ".join(f"--config.{name}={value}" for name, value in change.items())
