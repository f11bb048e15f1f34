"""Searches for the smallest change of a config that makes its step fit a device's memory.

The search tries four kinds of changes in this order: `model.remat`, which costs arithmetic;
`train.accumulation_steps`, which makes batches smaller; both together; and `mesh.fsdp`, which costs
communication. The search skips a change if the computed memory is far too large. It compiles the
step with each of the other changes until a step fits.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import jax

from mobilellm_jax.config import Config, ConfigError, Remat, changed
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.plan.compiled import CompiledStep, TooLarge, compile_step

_log = logging.getLogger(__name__)
# The search skips a change if the computed bytes exceed this multiple of the memory. The computed
# bytes have an error of less than a tenth.
_HOPELESS = 1.1
_MOST_ACCUMULATION = 1024

Change = dict[str, Any]
"""New values of config fields, by dotted name."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A changed config that fits the memory, the change itself, and the compiled training step."""

    change: Change
    config: Config
    step: CompiledStep


def smallest_fit(config: Config, devices: Sequence[jax.Device], failed: TooLarge) -> Fit | None:
    """Returns the first change of `candidates` that fits, or None if no change fits.

    `failed` is the result of `compile_step` for the unchanged `config`. `settle` must have replaced
    every "auto" in `config`.
    """
    # The compiled step needs more bytes than `account_of` counts, mostly for the compiler's own
    # buffers.
    missing = failed.needed_bytes - account_of(config, devices).total_bytes
    for change in candidates(config, len(devices)):
        try:
            candidate = changed(config, change)
            expected = account_of(candidate, devices).total_bytes + max(0, missing)
        except ConfigError:
            continue
        if expected > _HOPELESS * failed.available_bytes:
            continue
        _log.info(f"compiling with {written(change)} ...")  # Compiling can take minutes.
        step = compile_step(candidate, devices)
        if isinstance(step, CompiledStep):
            return Fit(change, candidate, step)
    return None


def candidates(config: Config, num_devices: int) -> Iterator[Change]:
    """Yields changes, smallest first; a change may violate the rules of a config."""
    order = [name for name in get_args(Remat) if name != "offload"]
    remats = order[order.index(config.model.remat) + 1 :] if config.model.remat in order else []
    remat_only: list[Change] = [{"model.remat": remat} for remat in remats]
    now, batch = config.train.accumulation_steps, config.train.global_batch
    accumulation_only: list[Change] = [
        {"train.accumulation_steps": steps}
        for steps in range(2 * now, min(_MOST_ACCUMULATION, batch) + 1, now)
        if batch % steps == 0
    ]
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
    """Returns the change as command line flags."""
    return " ".join(f"--config.{name}={value}" for name, value in change.items())
