"""Products of activations with weights, in the form that each device computes fastest.

The gradient is written out, because JAX's own costs XLA's CPU backend a transposed copy of every
weight's gradient, a fifth of a block's time. In bfloat16 that backend has fast kernels only for
products that return their float32 sums: asked for bfloat16 it converts all operands and multiplies
in float32, at less than half the speed, or a sixth where a CPU has matrix units. Other devices
accumulate in float32 whatever they return.

A matrix may be quantized (`quantized.py`): what it is multiplied with then is its own rule.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobilellm_jax.model.quantized import (
    Kernel,
    QuantizedKernel,
    TrainedKernel,
    quantized_product,
    tokens_on_levels,
)


def product(spec: str, x: jax.Array, kernel: Kernel) -> jax.Array:
    """Returns einsum(spec, x, kernel) in the type of x, which the kernel is converted to.

    Sums are float32 in both directions. `spec` is two inputs and an output, such as
    "BTD,DF->BTF"; every letter of an input is in the other one or in the output.
    """
    if isinstance(kernel, QuantizedKernel):
        return quantized_product(spec, x, kernel).astype(x.dtype)
    x, matrix = operands(spec, x, kernel)
    return _product(spec, x, matrix.astype(x.dtype))


def scores(spec: str, x: jax.Array, head: Kernel) -> jax.Array:
    """Returns einsum(spec, x, head) in float32; a float head is converted to the type of x."""
    if isinstance(head, QuantizedKernel):
        return quantized_product(spec, x, head)
    x, matrix = operands(spec, x, head)
    return jnp.einsum(spec, x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)


def narrowed(kernel: Kernel, dtype: jax.typing.DTypeLike) -> Kernel:
    """Returns a matrix of floats in that type; one of integers has no other."""
    if isinstance(kernel, QuantizedKernel):
        return kernel
    if isinstance(kernel, TrainedKernel):
        return dataclasses.replace(kernel, values=kernel.values.astype(dtype))
    return kernel.astype(dtype)


def operands(spec: str, x: jax.Array, kernel: Kernel) -> tuple[jax.Array, jax.Array]:
    """Returns what is multiplied in floating point: with a `TrainedKernel`, numbers on levels."""
    assert not isinstance(kernel, QuantizedKernel), "its products are integers, without gradients"
    if not isinstance(kernel, TrainedKernel):
        return x, kernel
    if kernel.integer_products:
        inputs, out_axes = spec.split("->")
        summed = tuple(i for i, axis in enumerate(inputs.split(",")[0]) if axis not in out_axes)
        x = tokens_on_levels(x, summed)
    return x, kernel.values


def rows_of(table_VD: Kernel, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Returns the table's rows, as floats of whatever type it holds or stands for."""
    if isinstance(table_VD, QuantizedKernel):
        rows: jax.Array = table_VD.values[tokens].astype(jnp.float32) * table_VD.scale[tokens]
        return rows
    table: jax.Array = table_VD.values if isinstance(table_VD, TrainedKernel) else table_VD
    return table[tokens]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _einsum(spec, x, kernel)


def _forward(
    spec: str, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum(spec, x, kernel), (x, kernel)


def _backward(
    spec: str, operands: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = operands
    inputs, out_axes = spec.split("->")
    x_axes, kernel_axes = inputs.split(",")
    grad_x = _einsum(f"{out_axes},{kernel_axes}->{x_axes}", grad, kernel)
    return grad_x, _einsum(f"{x_axes},{out_axes}->{kernel_axes}", x, grad)


_product.defvjp(_forward, _backward)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    def plain(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b)

    def summed_wide(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(a.dtype)

    if a.dtype == jnp.float32:
        return plain(a, b)
    product: jax.Array = jax.lax.platform_dependent(a, b, cpu=summed_wide, default=plain)
    return product
