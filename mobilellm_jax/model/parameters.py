"""How parameters are made: float32, with a logical name for every axis."""

from typing import Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mobilellm_jax.config import ModelConfig


class _Configured(Protocol):
    config: ModelConfig


def matrix(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]
) -> jax.Array:
    """Returns the module's matrix `name`, drawn from N(0, init_std^2) when it is initialised.

    That holds for every matrix and the embedding table, with no scaling by depth, as in the
    paper's published code. The module has the model's `config`.
    """
    std = cast(_Configured, module).config.init_std
    init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
    return cast(jax.Array, module.param(name, init, shape, jnp.float32))


def norm_scale(module: nn.Module, name: str, width: int) -> jax.Array:
    """Returns the module's norm scale `name`, 1 when it is initialised."""
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
    return cast(jax.Array, module.param(name, init, (width,), jnp.float32))
