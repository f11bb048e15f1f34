"""Quantizes a model's parameters: after training to integers, in training to floats on levels.

Only float parameters are saved. `quantized` and `on_levels` are pure functions that jax traces like
the model, on a mesh too. The matrices of the blocks are stacked, and each block's matrix is
quantized separately.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.parameters import ATTENTION_PRODUCTS
from mobilellm_jax.model.products import Kernel
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.quantize.attention import QuantizedAttention
from mobilellm_jax.quantize.kernels import (
    QuantizedKernel,
    TrainedKernel,
    kernel_on_levels,
    to_kernel,
)
from mobilellm_jax.quantize.schemes import Scheme, check_scheme

NUM_INPUTS = {
    **dict.fromkeys(("query", "key", "value", "gate", "up", "down"), 1),
    "output": 2,  # heads and their channels
}
"""The number of leading axes of a block's matrix that are its inputs."""

_Quantize = Callable[..., Kernel]


def quantized(params: Params, scheme: Scheme) -> Params:
    """Returns the parameters with integers and scales for the matrices of the scheme.

    Norms, and parts that the scheme does not name, stay as they are.
    """

    def quantize(matrix: jax.Array, *, num_inputs: int, bits: int, group_size: int) -> Kernel:
        return to_kernel(
            matrix,
            num_inputs=num_inputs,
            bits=bits,
            group_size=group_size,
            integer_products=scheme.integer_products,
        )

    return _replaced(params, scheme, quantize)


def quantize_model(config: ModelConfig, params: Params, scheme: Scheme) -> Params:
    """Checks the parameters of a model on a device, and returns `quantized` of them.

    Raises:
      ConfigError: if the scheme names one side of tied embeddings.
      UserError: if parameters are not finite.
    """
    check_scheme(scheme, config)
    check_finite(params)
    integers: Params = jax.jit(functools.partial(quantized, scheme=scheme))(params)
    return integers


def on_levels(params: Params, scheme: Scheme) -> Params:
    """Returns the parameters that a training step computes with, differentiable in `params`."""

    def quantize(matrix: jax.Array, *, num_inputs: int, bits: int, group_size: int) -> Kernel:
        levels = kernel_on_levels(matrix, num_inputs=num_inputs, bits=bits, group_size=group_size)
        return TrainedKernel(levels, integer_products=scheme.integer_products)

    return _replaced(params, scheme, quantize)


def _replaced(params: Params, scheme: Scheme, quantize: _Quantize) -> Params:
    def stacked(matrices: Params) -> Params:
        return {
            name: jax.vmap(
                functools.partial(
                    quantize,
                    num_inputs=NUM_INPUTS[name],
                    bits=scheme.weight_bits,
                    group_size=scheme.group_size,
                )
            )(matrix_U)
            for name, matrix_U in matrices.items()
        }

    def rows(matrix: jax.Array) -> Kernel:
        # Every token has a scale: a row of the table, or a column of the head.
        return quantize(matrix, num_inputs=1, bits=8, group_size=0)

    blocks = params["blocks"]
    attention = stacked(blocks["attention"])
    if {"attention", "cache"} & set(scheme.parts):
        attention[ATTENTION_PRODUCTS] = QuantizedAttention(
            products="attention" in scheme.parts, cache="cache" in scheme.parts
        )
    changed = {
        **params,
        "blocks": {
            **blocks,
            "attention": attention,
            "feed_forward": stacked(blocks["feed_forward"]),
        },
    }
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
    """Returns the bits of all values and scales, divided by the parameters of the model."""
    numbers: int = sum(
        leaf.values.size if isinstance(leaf, QuantizedKernel) else leaf.size
        for leaf in jax.tree.leaves(params, is_leaf=_is_kernel)
    )
    return 8 * stored_bytes(params) / numbers


def as_arrays(kernel: QuantizedKernel, num_inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a matrix for files: int8 values [inputs, outputs], float32 scales [groups, outputs].

    Row i of the values uses row i // group_size of the scales. 4-bit values are int8 too. The input
    axis of the embedding table is its last axis, so pass the transposed table.
    """
    values = np.asarray(kernel.values.astype(jnp.int8))
    inputs = math.prod(values.shape[:num_inputs])
    scale = np.asarray(kernel.scale)
    return values.reshape(inputs, -1), scale.reshape(scale.shape[0], -1)


def check_finite(params: Params) -> None:
    """Refuses parameters that are not finite.

    Raises:
      UserError: with their names.
    """
    wrong = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not bool(jnp.all(jnp.isfinite(leaf)))
    ]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)} must be finite to be quantized; choose an earlier checkpoint, "
            "from before the training diverged."
        )


def _is_kernel(node: object) -> bool:
    return isinstance(node, QuantizedKernel)
