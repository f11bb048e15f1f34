"""Formats the plan as lines of text."""

from collections.abc import Mapping, Sequence

import jax

from mobilellm_jax.config import Config
from mobilellm_jax.model.size import FLOP_CONVENTION
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.plan.compiled import CompiledStep, TooLarge
from mobilellm_jax.plan.hlo import COLLECTIVES, Program
from mobilellm_jax.plan.memory import Shortage
from mobilellm_jax.plan.prediction import Prediction
from mobilellm_jax.plan.topology import Chip
from mobilellm_jax.startup.messages import counted
from mobilellm_jax.train.state import mesh_of

_GIB = 2**30
_WIDTH = 20
_LARGEST = 6  # Number of collectives that are listed one by one.


def account_lines(config: Config, devices: Sequence[jax.Device]) -> list[str]:
    """Returns lines about the run and its computed sizes."""
    account, mesh = account_of(config, devices), mesh_of(config, devices)[0].shape
    model, train = config.model, config.train
    sharing = f" x {model.num_repeats} ({model.sharing})" if model.num_repeats > 1 else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    rows = {
        "model": f"{account.parameters:,} parameters, {model.num_blocks} blocks{sharing}, "
        f"compute {model.compute_dtype}, attention {model.attention}, remat {model.remat}",
        "FLOPs": f"{account.flops_per_token:,} per token in sequences of {config.data.seq_len} "
        f"({FLOP_CONVENTION})",
        "mesh": f"{axes}: {counted(account.num_devices, 'device')}",
        "batch": f"{train.global_batch} x {config.data.seq_len} = {account.tokens_per_step:,} "
        f"tokens a step; {counted(account.rows, 'sequence')} on a device at once"
        + (f", {train.accumulation_steps} times" if train.accumulation_steps > 1 else ""),
        "per device": f"weights {_gib(account.weight_bytes)}, optimizer "
        f"{_gib(account.optimizer_bytes)}, gradients {_gib(account.gradient_bytes)}, activations "
        f"{_gib(account.activation_bytes)}, loss {_gib(account.loss_bytes)}: "
        f"{_gib(account.total_bytes)} by count",
    }
    return _lines(rows)


def fit_lines(missing: Shortage | None, available: int | None) -> list[str]:
    """Returns a line about whether the computed memory fits this machine."""
    if available is None:
        return _lines({"memory": "the devices of this machine do not tell how much they have"})
    if missing is None:
        return _lines({"fits": f"by count; {_gib(available)} are available on each device"})
    return _lines({"does not fit" if missing.is_certain else "may not fit": str(missing)})


def too_large_lines(failed: TooLarge) -> list[str]:
    """Returns a line about the needed and the available memory of a step that does not fit."""
    text = (
        f"needs {_gib(failed.needed_bytes)} of the {_gib(failed.available_bytes)} that a device "
        f"has (compiled in {failed.compile_sec:.0f} s)"
    )
    return _lines({"does not fit": text})


def step_lines(config: Config, step: CompiledStep, prediction: Prediction, chip: Chip) -> list[str]:
    """Returns lines about the compiled step's memory and communication, and its predicted time."""
    memory = (
        f"{_gib(step.peak_bytes)} of {_gib(chip.memory_bytes)} at the peak; state "
        f"{_gib(step.state_bytes)}, temporaries {_gib(step.temporary_bytes)} with gaps "
        f"(compiled in {step.compile_sec:.0f} s)"
    )
    lines = [*_lines({"fits": memory}), *_collective_lines(step.program)]
    if loops := step.program.unknown_loops:
        note = f"{counted(loops, 'loop')} of unknown length counted as one iteration"
        lines += _lines({"note": note})
    cycles = step.program.estimated_cycles
    return lines + _prediction_lines(config.tokens_per_step, prediction, chip.name, cycles)


def _collective_lines(program: Program) -> list[str]:
    rows = {}
    for kind in COLLECTIVES:
        found = [c for c in program.collectives if c.kind == kind]
        times = sum(c.times for c in found)
        payload = sum(c.payload_bytes * c.times for c in found)
        sent = sum(c.wire_bytes for c in found)
        text = f"{times} a step, {_mb(payload)}, of which a device sends {_mb(sent)}"
        rows[kind] = text if found else "none"
    largest = sorted(program.collectives, key=lambda c: -c.wire_bytes)[:_LARGEST]
    return _lines(rows) + [
        f"{'':{_WIDTH}}{c.times} x {c.kind} {_short(c.shape)} among {c.group}: {_place(c.origin)}"
        for c in largest
    ]


def _prediction_lines(
    tokens: int, prediction: Prediction, chip_name: str, cycles: int | None
) -> list[str]:
    roofline = prediction.roofline_sec
    rows = {
        "roofline": f"{_ms(roofline)} a step at least: model FLOPs {_ms(prediction.flops_sec)} at "
        f"{prediction.peak_flops / 1e12:.0f} TFLOP/s, memory {_ms(prediction.memory_sec)}, "
        f"network {_ms(prediction.network_sec)}; {tokens / roofline:,.0f} tokens/s at most",
    }
    if cycles is None or prediction.estimated_sec is None:
        return _lines(rows)
    fastest, slowest = prediction.fastest_sec, prediction.slowest_sec
    utilization = [prediction.flops_sec / seconds for seconds in (slowest, fastest)]
    rows["prediction"] = (
        f"{_ms(fastest)} to {_ms(slowest)} a step (all communication hidden, or none), "
        f"{tokens / slowest:,.0f} to {tokens / fastest:,.0f} tokens/s, MFU "
        f"{utilization[0]:.0%} to {utilization[1]:.0%}"
    )
    rows[""] = (
        f"libtpu's estimate for {chip_name}: {cycles / 1e6:.0f} M cycles without "
        f"attention kernels; those {_ms(prediction.kernels_sec)} by their FLOPs. Not measured."
    )
    return _lines(rows)


def _lines(rows: Mapping[str, str]) -> list[str]:
    return [f"{name:{_WIDTH}}{text}" for name, text in rows.items()]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _short(shape: str) -> str:
    arrays = shape.split(", ")
    return arrays[0] if len(arrays) == 1 else f"{arrays[0]} and {len(arrays) - 1} more"


def _place(origin: str) -> str:
    """Returns the last three parts of an operation's name, which name the module."""
    return "/".join(origin.split("/")[-3:]) or "unnamed"
