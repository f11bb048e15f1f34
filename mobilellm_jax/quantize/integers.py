"""Numbers as integers of 8 or 4 bits with scales.

The rule is symmetric min-max (paper Sec. 3.4, which gives no details). A number is value * scale,
where scale = the largest magnitude / 127, or / 7 for 4 bits. Numbers that share a scale form a row,
a channel or a group. If all numbers of a group are zero, their scale is 1. If one number of a group
is not finite, no dequantized number of this group is finite. The rounding error of every number is
at most half of its scale, so an outlier makes the errors of its group large.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Integer

LEVELS = {8: 127, 4: 7}
"""The largest integer of each width; its negative is the smallest."""

_TINY = np.finfo(np.float32).tiny  # XLA's CPU backend replaces smaller numbers by 0.

if TYPE_CHECKING:
    Leaf = Array
else:
    Leaf = Any  # In trees that jax makes, leaves may be shapes or shardings.


@struct.dataclass
class QuantizedRows:
    """8-bit numbers with one scale for each row along the last axis."""

    values: Leaf  # Integers, int8[*rows n].
    scale: Leaf  # Scales, float32[*rows 1].

    def astype(self, dtype: jax.typing.DTypeLike) -> Float[Array, "*rows n"]:
        """Returns value * scale."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def scale_of(largest: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """Returns the float32 scale of numbers with this largest magnitude."""
    scale = largest.astype(jnp.float32) / LEVELS[bits]
    return jnp.where(scale < _TINY, 1.0, scale)


def to_rows(x: Float[Array, "*rows n"]) -> QuantizedRows:
    """Quantizes to 8 bits, with one scale for each row along the last axis."""
    wide = x.astype(jnp.float32)
    scale = scale_of(jnp.max(jnp.abs(wide), axis=-1, keepdims=True, initial=0.0), 8)
    return QuantizedRows(values=jnp.round(wide / scale).astype(jnp.int8), scale=scale)


def on_levels(x: Float[Array, "..."], scale: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """Rounds each number of x to the nearest level; the result has the type of x.

    The levels are `scale` times the integers from -LEVELS[bits] to LEVELS[bits]. The gradient is
    that of a straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): 1 for every number
    within the range of the levels, and 0 beyond. The scale gets no gradient.
    """
    wide, scale = x.astype(jnp.float32), jax.lax.stop_gradient(scale)
    highest = LEVELS[bits] + 0.5  # Numbers up to here round to the last level.
    within = jnp.clip(wide, -highest * scale, highest * scale)
    rounded = jnp.clip(jnp.round(wide / scale), -LEVELS[bits], LEVELS[bits]) * scale
    return (within + jax.lax.stop_gradient(rounded - within)).astype(x.dtype)


def tokens_on_levels(
    x: Float[Array, "..."], axes: int | tuple[int, ...] = -1
) -> Float[Array, "..."]:
    """Rounds x like `to_rows`, with one scale for each row along these axes.

    The gradient is that of `on_levels`.
    """
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes, keepdims=True, initial=0.0)
    return on_levels(x, scale_of(largest, 8), 8)


def integer_einsum(
    spec: str, a: Integer[Array, "..."], b: Integer[Array, "..."]
) -> Integer[Array, "..."]:
    """Returns the einsum of integers of at most 8 bits, summed in int32.

    An int32 can hold a sum of 133,000 products of two such integers: 2^31 / 127^2.
    """
    a, b = a.astype(jnp.int8), b.astype(jnp.int8)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.int32)
