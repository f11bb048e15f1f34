"""Compiles the real training step, also for devices that are absent."""

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mobilellm_jax.config import Config
from mobilellm_jax.plan.hlo import Program, read_program
from mobilellm_jax.quantize.parameters import training_transform
from mobilellm_jax.sharding import Rules, batch_sharding
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import abstract_state
from mobilellm_jax.train.step import make_train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# libtpu has two messages: one for temporaries alone, and one for all buffers together.
_EXCEEDS = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step that fits; all bytes are bytes per device."""

    state_bytes: int  # parameters, optimizer state and batch, updated in place
    temporary_bytes: int  # temporaries with the gaps between them
    peak_bytes: int  # largest use at any moment, with the state; this number must fit
    program: Program
    compile_sec: float


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A step that does not fit."""

    needed_bytes: int
    available_bytes: int
    compile_sec: float


def lower_step(config: Config, mesh: Mesh, rules: Rules) -> jax.stages.Lowered:
    """Lowers the step that `train` runs."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = abstract_state(config, optimizer, mesh, rules)
    step = make_train_step(config, optimizer, mesh, rules, state, training_transform(config))
    return step.lower(state, batch_shapes(config, mesh))


def batch_shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays of a global batch that the step of `train` takes, without values."""
    names = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.boundaries == "document_mask":
        names |= {"segments": jnp.int32, "positions": jnp.int32}
    shape = (config.train.global_batch, config.data.seq_len)
    sharding = batch_sharding(mesh)
    return {n: jax.ShapeDtypeStruct(shape, d, sharding=sharding) for n, d in names.items()}


def compile_step(config: Config, mesh: Mesh, rules: Rules) -> CompiledStep | TooLarge:
    """Compiles the step of a config that `settle` returned."""
    lowered = lower_step(config, mesh, rules)
    began = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = needed_and_available(str(error))
        if sizes is None:
            raise
        return TooLarge(*sizes, compile_sec=time.perf_counter() - began)
    compile_sec = time.perf_counter() - began
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None, "XLA's compilers give both"
    return CompiledStep(
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        program=read_program(text),
        compile_sec=compile_sec,
    )


def needed_and_available(message: str) -> tuple[int, int] | None:
    """Returns the needed and the available bytes from the compiler's message, or None."""
    found = _EXCEEDS.search(message) or _USED.search(message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    needed, unit, available, available_unit = found.groups()
    return (
        round(float(needed) * _UNITS[unit]),
        round(float(available) * _UNITS[available_unit]),
    )
