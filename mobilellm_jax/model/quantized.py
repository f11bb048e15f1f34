"""Matrices in 8 or 4 bits and activations in 8, and what is computed with them.

A quantized model is the same modules with other leaves in its parameter tree: `product` meets a
`QuantizedKernel` where a matrix was, and `Attention` finds a `QuantizedAttention` beside its own.
So sharing, the scan, meshes and decoding are those of the model in float32.

The rule is symmetric min-max (paper Sec. 3.4, which says no more): a number is value * scale, with
scale = the largest magnitude / 127, or / 7 for 4 bits. A weight shares its scale with the others of
its output channel, or with a group of them along the inputs; an activation with the others of its
token. Where all are zero the scale is 1, and where one is not finite so is everything with it. An
outlier takes the range for itself: the error of every neighbour is at most half of its scale.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Integer

LEVELS = {8: 127, 4: 7}  # the largest value; its negative is the smallest
_TYPES = {8: jnp.int8, 4: jnp.int4}
_STATIC = {"pytree_node": False}  # part of the program, not of its input
_TINY = np.finfo(np.float32).tiny  # below, XLA's CPU backend computes with 0

Leaf = Any
"""An array or what stands for one, such as its shape, in a tree that jax made of its own."""


@struct.dataclass
class QuantizedKernel:
    """A matrix as integers.

    `values` has the axes of the matrix, and so has `scale`: outputs as they are, the first axis of
    the inputs counts groups, every other one is 1. Groups lie along the inputs taken as one axis;
    the last is shorter where the size does not divide them.
    """

    values: Leaf  # int8 or int4
    scale: Leaf  # float32
    group_size: int = dataclasses.field(default=0, metadata=_STATIC)  # inputs; 0 = all of a channel
    integer_products: bool = dataclasses.field(default=True, metadata=_STATIC)  # else weights alone

    @property
    def T(self) -> "QuantizedKernel":  # noqa: N802  # as of an array
        """The transposed matrix."""
        return dataclasses.replace(self, values=self.values.T, scale=self.scale.T)


@struct.dataclass
class TrainedKernel:
    """A float matrix that quantization-aware training multiplies with: on its levels already."""

    values: Leaf
    integer_products: bool = dataclasses.field(default=True, metadata=_STATIC)

    @property
    def T(self) -> "TrainedKernel":  # noqa: N802  # as of an array
        """The transposed matrix."""
        return dataclasses.replace(self, values=self.values.T)


Kernel = Array | QuantizedKernel | TrainedKernel
"""A matrix in any form that `product` takes."""


@struct.dataclass
class QuantizedAttention:
    """What a model computes in 8 bits besides its matrices; has no leaves."""

    products: bool = dataclasses.field(default=False, metadata=_STATIC)
    cache: bool = dataclasses.field(default=False, metadata=_STATIC)


@struct.dataclass
class QuantizedRows:
    """Numbers in 8 bits with a scale for each row along the last axis."""

    values: Integer[Array, "*rows n"]
    scale: Float[Array, "*rows 1"]

    def dequantized(self, dtype: jax.typing.DTypeLike) -> Float[Array, "*rows n"]:
        """Returns the numbers that this stands for."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def scale_of(largest: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """Returns the scale of numbers whose largest magnitude is given, float32."""
    scale = largest.astype(jnp.float32) / LEVELS[bits]
    return jnp.where(scale < _TINY, 1.0, scale)


def to_rows(x: Float[Array, "*rows n"]) -> QuantizedRows:
    """Quantizes to 8 bits, with a scale for each row along the last axis."""
    wide = x.astype(jnp.float32)
    scale = scale_of(jnp.max(jnp.abs(wide), axis=-1, keepdims=True, initial=0.0), 8)
    return QuantizedRows(values=jnp.round(wide / scale).astype(jnp.int8), scale=scale)


def to_kernel(
    kernel: Float[Array, "..."],
    *,
    num_inputs: int,
    bits: int,
    group_size: int = 0,
    integer_products: bool = True,
) -> QuantizedKernel:
    """Quantizes a matrix whose first `num_inputs` axes are its inputs."""
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
    """Returns the float32 matrix that the integers stand for; the inverse of `to_kernel`."""
    groups = _groups(kernel.values.astype(jnp.float32), num_inputs, kernel.group_size)
    scaled = groups * kernel.scale.reshape(groups.shape[0], 1, *kernel.values.shape[num_inputs:])
    return _ungrouped(scaled, kernel.values.shape, num_inputs)


def on_levels(x: Float[Array, "..."], scale: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """Returns x as its integers stand for it, in the type of x; straight through for the gradient.

    That is 1 for every number within the range of the levels and 0 beyond, where another x would
    change nothing; none flows into the scale (Bengio et al. 2013, arXiv:1308.3432).
    """
    wide, scale = x.astype(jnp.float32), jax.lax.stop_gradient(scale)
    highest = LEVELS[bits] + 0.5  # what is rounded down to the last level is within
    within = jnp.clip(wide, -highest * scale, highest * scale)
    rounded = jnp.clip(jnp.round(wide / scale), -LEVELS[bits], LEVELS[bits]) * scale
    return (within + jax.lax.stop_gradient(rounded - within)).astype(x.dtype)


def tokens_on_levels(
    x: Float[Array, "..."], axes: int | tuple[int, ...] = -1
) -> Float[Array, "..."]:
    """Returns `on_levels` of 8 bits with a scale for each row along these axes, as `to_rows`."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes, keepdims=True, initial=0.0)
    return on_levels(x, scale_of(largest, 8), 8)


def kernel_on_levels(
    kernel: Float[Array, "..."], *, num_inputs: int, bits: int, group_size: int
) -> Float[Array, "..."]:
    """Returns `on_levels` of a matrix, with the scales that `to_kernel` gives it."""
    groups, scale = _groups_and_scale(kernel, num_inputs, bits, group_size)
    return _ungrouped(on_levels(groups, scale, bits), kernel.shape, num_inputs)


def quantized_product(spec: str, x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    """Returns einsum(spec, x, kernel) in float32.

    With `integer_products`, x is quantized too, int8 x int8 is summed in int32, and the sums are
    scaled in float32: once for a channel, or each group's before they are added up. Otherwise only
    the weights are integers, and the products are in the type of x.

    `spec` is as for `product`: what is summed over are the last axes of x, and the first ones of
    the kernel or the last of two.
    """
    inputs, out_axes = spec.split("->")
    x_axes, kernel_axes = inputs.split(",")
    if kernel_axes[0] in out_axes:  # a head that lies as its table does; XLA moves nothing for this
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

    # One by one: as one product with an axis for groups it took 50 times as long on a CPU, and as
    # much memory for every group as for the result.
    zeros = jnp.zeros((*lead, *outputs), jnp.float32)
    total, _ = jax.lax.scan(add, zeros, (x_groups, groups, scales))
    return total * rows.scale.reshape(*lead, *(1,) * len(outputs))


def integer_einsum(
    spec: str, a: Integer[Array, "..."], b: Integer[Array, "..."]
) -> Integer[Array, "..."]:
    """Returns the einsum of integers of 8 bits at most, summed in int32.

    That holds 133,000 terms, 2^31 / 127^2.
    """
    a, b = a.astype(jnp.int8), b.astype(jnp.int8)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.int32)


def _groups_and_scale(
    kernel: jax.Array, num_inputs: int, bits: int, group_size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the matrix in float32 as [n, size, outputs ...], and its scales [n, 1, ...]."""
    groups = _groups(kernel.astype(jnp.float32), num_inputs, group_size)
    largest = jnp.max(jnp.abs(groups), axis=1, keepdims=True, initial=0.0)
    return groups, scale_of(largest, bits)


def _groups(kernel: jax.Array, num_inputs: int, size: int) -> jax.Array:
    inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
    return _split(kernel.reshape(math.prod(inputs), *outputs), 0, size)


def _ungrouped(groups: jax.Array, shape: tuple[int, ...], num_inputs: int) -> jax.Array:
    """The inverse of `_groups`."""
    inputs = math.prod(shape[:num_inputs])
    flat = groups.reshape(groups.shape[0] * groups.shape[1], *groups.shape[2:])
    return flat[:inputs].reshape(shape)


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Splits an axis into groups of `size`, the last filled up with zeros; 0 = one of them all."""
    axis %= x.ndim
    size = size or max(1, x.shape[axis])
    groups = -(-x.shape[axis] // size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, groups * size - x.shape[axis])
    return jnp.pad(x, padding).reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :])
