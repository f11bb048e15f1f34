"""Weight matrices in 8 or 4 bits, as integers or as the floats that these integers stand for.

A quantized model has the same modules as the float32 model, but other leaves in its parameter tree.
The modules call `product`, which receives one of these kernels instead of an array. So layer
sharing, the scan, meshes and decoding work as in the float32 model.

A weight shares its scale with the other weights of its output channel, or with a group of them
along the inputs. An activation shares its scale with the other activations of its token.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from mobilellm_jax.model.products import SpecialKernel
from mobilellm_jax.quantize.integers import (
    Leaf,
    integer_einsum,
    on_levels,
    scale_of,
    to_rows,
    tokens_on_levels,
)

_TYPES = {8: jnp.int8, 4: jnp.int4}


@struct.dataclass
class QuantizedKernel(SpecialKernel):
    """A matrix as integers and scales.

    `scale` has as many axes as `values`. The first axis of `scale` counts the groups. The other
    input axes of `scale` have size 1, and its output axes equal those of the matrix. A group
    consists of `group_size` neighbouring inputs, after all input axes have been flattened into one.
    The last group is shorter if `group_size` does not divide the number of inputs.
    """

    values: Leaf  # Integers, int8 or int4.
    scale: Leaf  # Scales, float32.
    group_size: int = struct.field(pytree_node=False, default=0)  # Inputs per group; 0: one group.
    integer_products: bool = struct.field(pytree_node=False, default=True)

    def astype(self, dtype: jax.typing.DTypeLike) -> "QuantizedKernel":
        return self

    def __getitem__(self, rows: Int[Array, "*rows"]) -> Float[Array, "*rows columns"]:
        return self.values[rows].astype(jnp.float32) * self.scale[rows]

    def operands(self, spec: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        raise TypeError("A QuantizedKernel has integer products, which have no gradient.")

    def multiply(self, spec: str, x: jax.Array, multiply: Callable[..., jax.Array]) -> jax.Array:
        return _quantized_product(spec, x, self)


@struct.dataclass
class TrainedKernel(SpecialKernel):
    """A float matrix of quantization-aware training, already rounded to its levels."""

    values: Leaf
    integer_products: bool = struct.field(pytree_node=False, default=True)

    def astype(self, dtype: jax.typing.DTypeLike) -> "TrainedKernel":
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def __getitem__(self, rows: Int[Array, "*rows"]) -> Float[Array, "*rows columns"]:
        return self.values[rows]

    def operands(self, spec: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.integer_products:
            inputs, out_axes = spec.split("->")
            summed = [i for i, axis in enumerate(inputs.split(",")[0]) if axis not in out_axes]
            x = tokens_on_levels(x, tuple(summed))
        return x, self.values


def to_kernel(
    kernel: Float[Array, "..."],
    *,
    num_inputs: int,
    bits: int,
    group_size: int = 0,
    integer_products: bool = True,
) -> QuantizedKernel:
    """Quantizes a matrix whose first `num_inputs` axes are its input axes."""
    groups, scale = _groups_and_scale(kernel, num_inputs, bits, group_size)
    values = jnp.round(groups / scale).astype(_TYPES[bits])
    outputs = kernel.shape[num_inputs:]
    return QuantizedKernel(
        values=_ungrouped(values, kernel.shape, num_inputs),
        scale=scale.reshape(scale.shape[0], *(1,) * (num_inputs - 1), *outputs),
        group_size=group_size,
        integer_products=integer_products,
    )


def dequantized(kernel: QuantizedKernel, *, num_inputs: int) -> Float[Array, "..."]:
    """Returns the float32 matrix value * scale; inverts `to_kernel` except for rounding."""
    groups = _groups(kernel.values.astype(jnp.float32), num_inputs, kernel.group_size)
    scaled = groups * kernel.scale.reshape(groups.shape[0], 1, *kernel.values.shape[num_inputs:])
    return _ungrouped(scaled, kernel.values.shape, num_inputs)


def to_trained_kernel(
    kernel: Float[Array, "..."],
    *,
    num_inputs: int,
    bits: int,
    group_size: int,
    integer_products: bool = True,
) -> TrainedKernel:
    """Rounds a matrix as `to_kernel` does; the gradient is that of `on_levels`."""
    groups, scale = _groups_and_scale(kernel, num_inputs, bits, group_size)
    values = _ungrouped(on_levels(groups, scale, bits), kernel.shape, num_inputs)
    return TrainedKernel(values, integer_products)


def _quantized_product(spec: str, x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    """Returns einsum(spec, x, kernel) in float32.

    With `integer_products`, x is quantized too, and int8 x int8 is summed in int32. Otherwise the
    weights are dequantized to the type of x.

    `spec` is the same as for `product`. The summed axes are the last axes of x, and the first axes
    of the kernel. A kernel with two axes may have its summed axis last instead.
    """
    inputs, out_axes = spec.split("->")
    x_axes, kernel_axes = inputs.split(",")
    if kernel_axes[0] in out_axes:
        # A tied head has the layout of the table. XLA moves no data for this transposition.
        kernel, kernel_axes = kernel.T, kernel_axes[::-1]
    num_inputs = sum(axis not in out_axes for axis in kernel_axes)
    if not kernel.integer_products:
        weights = dequantized(kernel, num_inputs=num_inputs).astype(x.dtype)
        spec = f"{x_axes},{kernel_axes}->{out_axes}"
        return jnp.einsum(spec, x, weights, preferred_element_type=jnp.float32)
    lead, outputs = x.shape[: x.ndim - num_inputs], kernel.values.shape[num_inputs:]
    rows = to_rows(x.reshape(*lead, math.prod(x.shape[len(lead) :])))
    x_groups = jnp.moveaxis(_split(rows.values, -1, kernel.group_size), -2, 0)
    groups = _groups(kernel.values, num_inputs, kernel.group_size)
    scales = kernel.scale.reshape(groups.shape[0], *(1,) * len(lead), *outputs)
    batch, channels = out_axes[: len(lead)], out_axes[len(lead) :]

    def add(total: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x_group, kernel_group, scale = group
        sums = integer_einsum(f"{batch}i,i{channels}->{out_axes}", x_group, kernel_group)
        return total + sums.astype(jnp.float32) * scale, None

    # The scan multiplies one group after another. A single einsum with an axis for the groups took
    # 50 times as long on a CPU, and kept one result per group in memory.
    zeros = jnp.zeros((*lead, *outputs), jnp.float32)
    total, _ = jax.lax.scan(add, zeros, (x_groups, groups, scales))
    return total * rows.scale.reshape(*lead, *(1,) * len(outputs))


def _groups_and_scale(
    kernel: jax.Array, num_inputs: int, bits: int, group_size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the float32 matrix [groups, size, outputs ...] and its scales [groups, 1, ...]."""
    groups = _groups(kernel.astype(jnp.float32), num_inputs, group_size)
    largest = jnp.max(jnp.abs(groups), axis=1, keepdims=True, initial=0.0)
    return groups, scale_of(largest, bits)


def _groups(kernel: jax.Array, num_inputs: int, size: int) -> jax.Array:
    inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
    return _split(kernel.reshape(math.prod(inputs), *outputs), 0, size)


def _ungrouped(groups: jax.Array, shape: tuple[int, ...], num_inputs: int) -> jax.Array:
    """Inverts `_groups`."""
    inputs = math.prod(shape[:num_inputs])
    flat = groups.reshape(groups.shape[0] * groups.shape[1], *groups.shape[2:])
    return flat[:inputs].reshape(shape)


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Splits an axis into groups of `size`, or one group if `size` is 0; pads with zeros."""
    axis %= x.ndim
    size = size or max(1, x.shape[axis])
    groups = -(-x.shape[axis] // size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, groups * size - x.shape[axis])
    return jnp.pad(x, padding).reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :])
