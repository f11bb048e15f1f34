"""Products of activations with weights, in the form that each device computes fastest.

The gradient is written out, because JAX's own costs XLA's CPU backend a transposed copy of every
weight's gradient, a fifth of a block's time. In bfloat16 that backend has fast kernels only for
products that return their float32 sums: asked for bfloat16 it converts all operands and multiplies
in float32, at less than half the speed, or a sixth where a CPU has matrix units. Other devices
accumulate in float32 whatever they return.
"""

from functools import partial

import jax
import jax.numpy as jnp


def product(spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns einsum(spec, x, kernel) in the type of x, which the kernel is converted to.

    Sums are float32 in both directions. `spec` is two inputs and an output, such as
    "BTD,DF->BTF"; every letter of an input is in the other one or in the output.
    """
    return _product(spec, x, kernel.astype(x.dtype))


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
