"""Compares what a run needs with the memory of this machine, before anything compiles."""

import dataclasses
from collections.abc import Sequence

import jax

from mobilellm_jax.config import Config, ConfigError, changed
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.plan.fit import Change, candidates, written
from mobilellm_jax.startup.host_memory import usable_bytes

_GIB = 2**30
# The computed bytes have an error of less than a tenth. Programs and libraries need memory too.
_TOO_LARGE = 1.1
_COMFORTABLE = 0.85


@dataclasses.dataclass(frozen=True)
class Shortage:
    """A run that needs more memory than there is; all bytes are bytes per device."""

    needed_bytes: int  # Computed from the config.
    available_bytes: int
    change: Change | None  # Smallest change with which the run fits; None if there is none.
    changed_bytes: int  # Computed from the changed config.

    @property
    def is_certain(self) -> bool:
        """Whether the shortage is larger than the error of the computed bytes."""
        return self.needed_bytes > _TOO_LARGE * self.available_bytes

    def __str__(self) -> str:
        needed = (
            f"a training step needs about {_gib(self.needed_bytes)} on each device, and "
            f"{_gib(self.available_bytes)} are available"
        )
        if self.change is None:
            return (
                f"{needed}. No change of model.remat, train.accumulation_steps or mesh.fsdp makes "
                "it fit; take a smaller model, a shorter data.seq_len or more memory."
            )
        return (
            f"{needed}. Add {written(self.change)}; the step then needs about "
            f"{_gib(self.changed_bytes)}."
        )


def memory_per_device(devices: Sequence[jax.Device]) -> int | None:
    """Returns the bytes that a run may use on each device; None if the device does not tell it.

    The devices of a CPU share the memory of the host.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    if local[0].platform == "cpu":
        return usable_bytes() // len(local)
    limit = (local[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit)


def shortage(
    config: Config, devices: Sequence[jax.Device], available: int | None = None
) -> Shortage | None:
    """Returns the shortage of memory for a run; None if the run fits, or the memory is unknown.

    The function compiles nothing. `settle` must have replaced every "auto" in `config`.
    `available` replaces the memory of the devices.
    """
    available = available or memory_per_device(devices)
    if available is None or _generous_bytes(config) <= _COMFORTABLE * available:
        return None
    needed = account_of(config, devices).total_bytes
    if needed <= _COMFORTABLE * available:
        return None
    # Changes of accumulation come first, because they slow down a run on one machine least. Each
    # value of remat needs a trace of the model, which takes a second.
    for change in sorted(candidates(config, len(devices)), key=_cost):
        try:
            then = account_of(changed(config, change), devices).total_bytes
        except ConfigError:  # The change breaks a rule.
            continue
        if then <= _COMFORTABLE * available:
            return Shortage(needed, available, change, then)
    return Shortage(needed, available, None, needed)


def _generous_bytes(config: Config) -> int:
    """Returns an upper bound of the bytes that a device needs.

    `account_of` traces the model, which takes a second. For a small run, this formula is enough.
    """
    model, length = config.model, config.data.seq_len
    rows = config.train.global_batch // config.train.accumulation_steps
    widths = 40 * model.embed_dim + 10 * model.ffn_dim
    widths += 10 * model.num_heads * (model.head_dim + length)
    activations = 4 * rows * length * model.applied_depth * widths
    logits = 12 * model.vocab_size * (config.train.loss_chunk + rows + model.embed_dim)
    return activations + logits + 32 * parameter_count(model)


def _cost(change: Change) -> tuple[bool, bool]:
    return "mesh.fsdp" in change, "model.remat" in change


def shortage_after(config: Config, devices: Sequence[jax.Device]) -> Shortage:
    """Returns the shortage of memory for a run that ran out of memory.

    The run needed more than computed. So the change has to need at most three quarters of the
    computed bytes, or of the available bytes if these are fewer.
    """
    needed = account_of(config, devices).total_bytes
    available = memory_per_device(devices) or needed
    found = shortage(config, devices, int(0.75 * min(needed, available) / _COMFORTABLE))
    assert found is not None, "the run needs more than this limit"
    return dataclasses.replace(found, available_bytes=available)


def _gib(size: float) -> str:
    return f"{size / _GIB:,.1f} GiB"
