"""How parameters are made: float32, with a logical name for every axis."""

from typing import Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.quantized import Kernel, QuantizedAttention

ATTENTION_IN_8_BITS = "in_8_bits"


class _Configured(Protocol):
    config: ModelConfig


def matrix(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Kernel:
    """Returns the module's matrix `name`, drawn from N(0, init_std^2) when it is initialised.

    That holds for every matrix and the embedding table, with no scaling by depth, as in the
    paper's published code. The module has the model's `config`.
    Parameters that were quantized have it as such.
    """
    std = cast(_Configured, module).config.init_std
    init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
    return cast(Kernel, module.param(name, init, shape, jnp.float32))


def attention_in_8_bits(module: nn.Module) -> QuantizedAttention:
    """Returns what the parameters say about keys, values and their products: mostly nothing."""
    said: QuantizedAttention | None = module.get_variable("params", ATTENTION_IN_8_BITS)
    return said or QuantizedAttention()


def norm_scale(module: nn.Module, name: str, width: int) -> jax.Array:
    """Returns the module's norm scale `name`, 1 when it is initialised."""
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
    return cast(jax.Array, module.param(name, init, (width,), jnp.float32))
