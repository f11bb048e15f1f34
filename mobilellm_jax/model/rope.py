"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

A rotated pair consists of the channels i and i + H/2, as in Hugging Face's Llama. So conversion
between the two programs does not change query and key weights.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Num


@struct.dataclass
class Rotation:
    """Cosine and sine of every position's angles in float32; all layers and heads share them."""

    cos_BT1P: Float[Array, "B T 1 P"]
    sin_BT1P: Float[Array, "B T 1 P"]


def rotation(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Rotation:
    """Returns the rotation of pair i by the angle position * theta^(-2i / head_dim)."""
    exponents_P = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies_P = 1.0 / (theta**exponents_P)
    angles_BT1P = positions_BT[:, :, None, None] * frequencies_P[None, None, None, :]
    return Rotation(cos_BT1P=jnp.cos(angles_BT1P), sin_BT1P=jnp.sin(angles_BT1P))


def rotate(x_BTNH: Num[Array, "B T N H"], turn: Rotation) -> Num[Array, "B T N H"]:
    """Rotates every head of queries or keys in float32; the result has the type of x."""
    first_BTNP, second_BTNP = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    halves = (
        first_BTNP * turn.cos_BT1P - second_BTNP * turn.sin_BT1P,
        second_BTNP * turn.cos_BT1P + first_BTNP * turn.sin_BT1P,
    )
    # Concatenation reads and writes all numbers, so each half is first converted to its final,
    # narrower type.
    return jnp.concatenate([half.astype(x_BTNH.dtype) for half in halves], axis=-1)
