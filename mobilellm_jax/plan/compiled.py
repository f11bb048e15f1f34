"""Compiles the step that `train` runs, also for devices that this machine does not have."""

import dataclasses
import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mobilellm_jax.config import Config
from mobilellm_jax.plan.hlo import Program, read_program
from mobilellm_jax.quantize.parameters import training_transform
from mobilellm_jax.sharding import batch_sharding
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import abstract_state, mesh_of
from mobilellm_jax.train.step import make_train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# libtpu has two messages for a step that is too large. One message gives the size of the temporary
# buffers, and the other message gives the size of all buffers.
_EXCEEDS = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step that fits the memory; all bytes are bytes per device."""

    state_bytes: int  # Inputs of the step: parameters, optimizer state and batch.
    temporary_bytes: int  # Temporary buffers, with the unused gaps between them.
    peak_bytes: int  # Largest use of memory during the step, including the state.
    program: Program
    compile_sec: float


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A step that does not fit the memory; all bytes are bytes per device."""

    needed_bytes: int
    available_bytes: int
    compile_sec: float


def lower_step(config: Config, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """Lowers the step that `train` runs."""
    mesh, rules = mesh_of(config, devices)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = abstract_state(config, optimizer, mesh, rules)
    step = make_train_step(config, optimizer, mesh, rules, state, training_transform(config))
    return step.lower(state, batch_shapes(config, mesh))


def batch_shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns name, shape and type of each array in a global batch."""
    names = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.boundaries == "document_mask":
        names |= {"segments": jnp.int32, "positions": jnp.int32}
    shape = (config.train.global_batch, config.data.seq_len)
    sharding = batch_sharding(mesh)
    return {n: jax.ShapeDtypeStruct(shape, d, sharding=sharding) for n, d in names.items()}


def compile_step(config: Config, devices: Sequence[jax.Device]) -> CompiledStep | TooLarge:
    """Compiles the training step; `settle` must have replaced every "auto" in `config`."""
    lowered = lower_step(config, devices)
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
    """Reads the needed and available bytes from an out-of-memory error; None for other errors."""
    found = _EXCEEDS.search(message) or _USED.search(message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    needed, unit, available, available_unit = found.groups()
    return round(float(needed) * _UNITS[unit]), round(float(available) * _UNITS[available_unit])
