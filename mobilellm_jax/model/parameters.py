"""How parameters are made: in float32, with a logical name for every axis."""

from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.products import Kernel
from mobilellm_jax.model.softmax import IN_FLOAT, AttentionProducts

ATTENTION_PRODUCTS = "products"
"""The name under which quantized parameters hold the `AttentionProducts` of their attention."""


class _Configured(Protocol):
    config: ModelConfig


def matrix(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Kernel:
    """Returns the matrix `name` of a module that has the model's `config`.

    Initialisation draws every matrix and the embedding table from N(0, model.init_std^2), with no
    scaling by depth, as in the paper's published code.
    """
    std = cast(_Configured, module).config.init_std
    init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
    return cast(Kernel, module.param(name, init, shape, jnp.float32))


def attention_products(module: nn.Module) -> AttentionProducts:
    """Returns the functions that compute the two products of an attention module.

    Without quantization, they compute in floating point.
    """
    chosen: AttentionProducts | None = module.get_variable("params", ATTENTION_PRODUCTS)
    return chosen or IN_FLOAT


def products_of(params: dict[str, Any]) -> AttentionProducts:
    """Returns the products of attention that a whole parameter tree asks for."""
    chosen: AttentionProducts | None = params["blocks"]["attention"].get(ATTENTION_PRODUCTS)
    return chosen or IN_FLOAT


def norm_scale(module: nn.Module, name: str, width: int) -> jax.Array:
    """Returns the norm scale `name` of a module; initialisation sets it to 1."""
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
    return cast(jax.Array, module.param(name, init, (width,), jnp.float32))
