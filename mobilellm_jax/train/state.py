"""Holds the training state, and decides how the mesh splits it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from mobilellm_jax.config import Config
from mobilellm_jax.model.transformer import Params, init_boxed
from mobilellm_jax.sharding import Rules, replicated, use
from mobilellm_jax.train.spikes import Recent, nothing_yet

Leaf = Any
"""An array, or `jax.ShapeDtypeStruct` in an abstract state."""


@struct.dataclass
class TrainState:
    """All inputs of a training step except its batch."""

    step: Leaf  # number of optimizer steps with skipped steps, int32 scalar
    params: Params  # float32
    optimizer: optax.OptState
    key_data: Leaf  # uint32 words of the PRNG key for samples during training
    bad_steps: Leaf  # number of latest consecutive steps that were not finite, int32 scalar
    skipped_steps: Leaf  # number of steps that updated nothing, int32 scalar
    recent: Recent  # recent values for the guard against spikes


def abstract_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> TrainState:
    """Returns shapes, types and shardings of the state without computing or allocating it.

    The optimizer's arrays for a parameter are split like the parameter. Other arrays are copied to
    every device.
    """
    with use(mesh, rules):
        # The seed is abstract too, because the devices may belong to an absent TPU topology.
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        boxed = jax.eval_shape(lambda s: init_boxed(config.model, jax.random.key(s)), seed)
        specs = nn.get_partition_spec(boxed)
        params_shardings = nn.logical_to_mesh_sharding(specs, mesh, list(rules))
        state = jax.eval_shape(lambda s: _init(config, optimizer, s), seed)

    def spread(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def spread_kept(leaf: Leaf, sharding: NamedSharding) -> Leaf:
        # A part of the optimizer has an empty node for each parameter that it does not update.
        return leaf if isinstance(leaf, optax.MaskedNode) else spread(leaf, sharding)

    def copied(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return spread(leaf, replicated(mesh))

    return TrainState(
        step=copied(state.step),
        params=jax.tree.map(spread, state.params, params_shardings),
        optimizer=optax.tree.map_params(
            *(optimizer, spread_kept, state.optimizer, params_shardings),
            transform_non_params=copied,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        ),
        key_data=copied(state.key_data),
        bad_steps=copied(state.bad_steps),
        skipped_steps=copied(state.skipped_steps),
        recent=jax.tree.map(copied, state.recent),
    )


def init_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> TrainState:
    """Returns a new state from `train.seed`; each device computes its own part."""
    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(config, optimizer, mesh, rules))
    with use(mesh, rules):
        init = jax.jit(lambda seed: _init(config, optimizer, seed), out_shardings=shardings)
        state: TrainState = init(jnp.uint32(config.train.seed))
    return state


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays]))


def is_finite(state: TrainState) -> bool:
    """Returns whether all parameters and all numbers of the optimizer are finite."""
    return bool(_all_finite(jax.tree.leaves((state.params, state.optimizer))))


def _init(config: Config, optimizer: optax.GradientTransformation, seed: jax.Array) -> TrainState:
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = nn.unbox(init_boxed(config.model, init_key))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(params),
        key_data=jax.random.key_data(run_key),
        bad_steps=jnp.zeros((), jnp.int32),
        skipped_steps=jnp.zeros((), jnp.int32),
        recent=nothing_yet(),
    )
