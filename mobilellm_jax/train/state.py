"""Defines the training state, its device mesh, and how the mesh splits its arrays."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Key

from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.model.on_device import device_violations
from mobilellm_jax.model.transformer import Params, boxed_shapes, init_boxed, param_shapes
from mobilellm_jax.sharding import Rules, batch_shards, logical_rules, make_mesh, replicated, use
from mobilellm_jax.train.spikes import Recent, nothing_yet

Leaf = Any
"""An array, or `jax.ShapeDtypeStruct` in an abstract state."""

Path = tuple[Any, ...]


@struct.dataclass
class TrainState:
    """All inputs of a training step except its batch."""

    step: Leaf  # Number of steps so far, including skipped steps, int32 scalar.
    params: Params  # Model parameters, float32.
    optimizer: optax.OptState  # State of the optimizer.
    key_data: Leaf  # Words of the PRNG key for samples during training, uint32.
    bad_steps: Leaf  # Number of latest consecutive steps that were not finite, int32 scalar.
    skipped_steps: Leaf  # Number of steps that updated nothing, int32 scalar.
    recent: Recent  # Recent values for the guard against spikes.


def abstract_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> TrainState:
    """Returns shapes, types and shardings of the state without computing or allocating it.

    The optimizer's arrays for a parameter are split like the parameter. Other arrays are copied to
    every device.
    """
    boxed, params = boxed_shapes(config.model), param_shapes(config.model)
    with use(mesh, rules):
        # The seed is abstract too, because the mesh may consist of TPUs that this machine does not
        # have.
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        state = jax.eval_shape(functools.partial(_new_state, optimizer), params, seed)
        specs = nn.get_partition_spec(boxed)
        params_shardings = nn.logical_to_mesh_sharding(specs, mesh, list(rules))
    by_names = {_names(path): s for path, s in jax.tree.leaves_with_path(params_shardings)}

    def with_sharding(path: Path, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = _names(path)
        found = (s for param, s in by_names.items() if names[-len(param) :] == param)
        sharding = next(found, replicated(mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    placed: TrainState = jax.tree.map_with_path(with_sharding, state)
    return placed


def _names(path: Path) -> tuple[str, ...]:
    """Returns the dict keys in a path. The optimizer's paths end with the keys of the parameter."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def init_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> TrainState:
    """Returns a new state from `train.seed`; each device computes its own part."""
    abstract = abstract_state(config, optimizer, mesh, rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    with use(mesh, rules):
        init = jax.jit(lambda seed: _init(config, optimizer, seed), out_shardings=shardings)
        state: TrainState = init(jnp.uint32(config.train.seed))
    return state


def mesh_violations(config: Config, mesh: Mesh) -> list[str]:
    """Returns one message for each rule that the config breaks on this mesh."""
    train, shards = config.train, batch_shards(mesh)
    violations = []
    if train.global_batch % (shards * train.accumulation_steps):
        violations.append(
            f"train.global_batch={train.global_batch} must be a multiple of mesh.data x mesh.fsdp "
            f"({shards}) x train.accumulation_steps ({train.accumulation_steps}); choose a "
            f"multiple of {shards * train.accumulation_steps}."
        )
    if config.data.seq_len % mesh.shape["sequence"]:
        violations.append(
            f"data.seq_len={config.data.seq_len} must be a multiple of "
            f"mesh.sequence={mesh.shape['sequence']}."
        )
    return violations + device_violations(config, mesh.devices.flat[0])


def mesh_of(config: Config, devices: Sequence[jax.Device]) -> tuple[Mesh, Rules]:
    """Returns the mesh and its sharding rules; raises `ConfigError` if the config does not fit."""
    mesh = make_mesh(config.mesh, devices)
    if violations := mesh_violations(config, mesh):
        raise ConfigError("\n".join(violations))
    return mesh, logical_rules(config.model, mesh.shape)


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays]))


def is_finite(state: TrainState) -> bool:
    """Returns whether all parameters and all numbers of the optimizer are finite."""
    return bool(_all_finite(jax.tree.leaves((state.params, state.optimizer))))


def _init(config: Config, optimizer: optax.GradientTransformation, seed: jax.Array) -> TrainState:
    init_key, _ = _keys(seed)
    return _new_state(optimizer, nn.unbox(init_boxed(config.model, init_key)), seed)


def _keys(seed: jax.Array) -> Key[Array, "2"]:
    """Returns two keys: for the parameters, and for the samples during training."""
    return jax.random.split(jax.random.key(seed))


def _new_state(
    optimizer: optax.GradientTransformation, params: Params, seed: jax.Array
) -> TrainState:
    _, run_key = _keys(seed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(params),
        key_data=jax.random.key_data(run_key),
        bad_steps=jnp.zeros((), jnp.int32),
        skipped_steps=jnp.zeros((), jnp.int32),
        recent=nothing_yet(),
    )
