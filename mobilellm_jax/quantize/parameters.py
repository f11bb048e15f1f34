"""Quantizes parameters: to integers after training, and to rounded floats during training.

Checkpoints hold only float parameters. `quantized` and `on_levels` are pure functions that jax can
trace, also on a mesh. The parameters stack the matrices of all blocks, but each block's matrix is
quantized separately.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.model.products import Kernel
from mobilellm_jax.model.softmax import ATTENTION_PRODUCTS
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.quantize.attention import QuantizedAttention
from mobilellm_jax.quantize.kernels import QuantizedKernel, to_kernel, to_trained_kernel
from mobilellm_jax.quantize.schemes import Scheme, check_scheme, trained_scheme

NUM_INPUTS = {
    **dict.fromkeys(("query", "key", "value", "gate", "up", "down"), 1),
    "output": 2,  # Heads and their channels.
}
"""The number of leading axes of a block's matrix that are its inputs."""


def quantized(params: Params, scheme: Scheme) -> Params:
    """Returns the parameters with integers and scales for the matrices of the scheme.

    The function does not change norms, nor parts that the scheme does not name.
    """
    return _replaced(params, scheme, to_kernel)


def quantize_model(config: ModelConfig, params: Params, scheme: Scheme) -> Params:
    """Checks the scheme, and returns the `quantized` parameters."""
    check_scheme(scheme, config)
    integers: Params = jax.jit(functools.partial(quantized, scheme=scheme))(params)
    return integers


def on_levels(params: Params, scheme: Scheme) -> Params:
    """Rounds the matrices that `scheme` quantizes; the gradient is that of `integers.on_levels`."""
    return _replaced(params, scheme, to_trained_kernel)


def training_transform(config: Config) -> Callable[[Params], Params]:
    """Returns the function that a training step applies to the parameters first.

    The function rounds the parameters to the levels of the run's scheme. Gradients pass through the
    rounding unchanged, to the float parameters. If the run has no scheme, the function returns the
    parameters unchanged.
    """
    scheme = trained_scheme(config)
    return functools.partial(on_levels, scheme=scheme) if scheme else lambda params: params


def derivation(config: Config) -> Callable[[Params], Params]:
    """Returns the function that converts a run's parameters to the integers that evaluation uses.

    If the run has no scheme, the function returns the parameters unchanged.
    """
    scheme = trained_scheme(config)
    return jax.jit(functools.partial(quantized, scheme=scheme)) if scheme else lambda params: params


def _replaced(params: Params, scheme: Scheme, to_kernel: Callable[..., Kernel]) -> Params:
    make = functools.partial(to_kernel, integer_products=scheme.integer_products)

    def stacked(name: str, matrix_U: jax.Array) -> Kernel:
        how = {"bits": scheme.weight_bits, "group_size": scheme.group_size}
        return jax.vmap(functools.partial(make, num_inputs=NUM_INPUTS[name], **how))(matrix_U)

    def rows(matrix: jax.Array) -> Kernel:
        # Each token has one scale, for its row of the table or its column of the head.
        return make(matrix, num_inputs=1, bits=8, group_size=0)

    blocks = dict(params["blocks"])
    for part in ("attention", "feed_forward"):
        blocks[part] = {name: stacked(name, matrix) for name, matrix in blocks[part].items()}
    if {"attention", "cache"} & set(scheme.parts):
        blocks["attention"][ATTENTION_PRODUCTS] = QuantizedAttention(
            products="attention" in scheme.parts, cache="cache" in scheme.parts
        )
    changed = {**params, "blocks": blocks}
    if "embedding" in scheme.parts:
        changed["embedding"] = {"table": rows(params["embedding"]["table"].T).T}
    if "head" in scheme.parts and "head" in params:
        changed["head"] = {"kernel": rows(params["head"]["kernel"])}
    return changed


def stored_bytes(params: object) -> int:
    """Returns the bytes of all arrays in a tree; two 4-bit numbers share a byte."""
    leaves: list[jax.Array] = jax.tree.leaves(params)
    bits = [4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize for leaf in leaves]
    return sum(-(-leaf.size * b // 8) for leaf, b in zip(leaves, bits, strict=True))


def bits_per_weight(params: Params) -> float:
    """Returns the bits of all values and scales, divided by the number of parameters."""
    numbers: int = sum(
        leaf.values.size if isinstance(leaf, QuantizedKernel) else leaf.size
        for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantizedKernel))
    )
    return 8 * stored_bytes(params) / numbers
