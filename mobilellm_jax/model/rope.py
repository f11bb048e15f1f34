"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

The rotated pairs are (i, i + H/2), the layout of Hugging Face's Llama, so that query and key
weights pass between the two unchanged.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Num


@struct.dataclass
class Rotation:
    """Cosine and sine of every position's angles, float32, shared by all layers and heads."""

    cos_BT1H: Float[Array, "B T 1 half"]
    sin_BT1H: Float[Array, "B T 1 half"]


def rotation(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Rotation:
    """Returns the rotation by angle position * theta^(-2i / head_dim) of pair i.

    The last axis has head_dim / 2 entries, one per pair.
    """
    exponents_H = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies_H = 1.0 / (theta**exponents_H)
    angles_BT1H = positions_BT[:, :, None, None] * frequencies_H[None, None, None, :]
    return Rotation(cos_BT1H=jnp.cos(angles_BT1H), sin_BT1H=jnp.sin(angles_BT1H))


def rotate(x_BTNH: Num[Array, "B T N H"], by: Rotation) -> Num[Array, "B T N H"]:
    """Rotates every head of queries or keys, in float32, returned in the type of x."""
    first_BTNH, second_BTNH = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    halves = (
        first_BTNH * by.cos_BT1H - second_BTNH * by.sin_BT1H,
        second_BTNH * by.cos_BT1H + first_BTNH * by.sin_BT1H,
    )
    # Each half to its final type before they are joined: joining is a pass over memory.
    return jnp.concatenate([half.astype(x_BTNH.dtype) for half in halves], axis=-1)
