"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

A rotated pair consists of the channels i and i + H/2, as in Hugging Face's Llama. So conversion
between the two programs does not change query and key weights.
"""

import math
from typing import assert_never

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Num

from mobilellm_jax.config import ModelConfig


@struct.dataclass
class Rotation:
    """Cosine and sine of every position's angles in float32; all layers and heads share them."""

    cos_BT1P: Float[Array, "B T 1 P"]
    sin_BT1P: Float[Array, "B T 1 P"]


def frequencies(config: ModelConfig) -> Float[Array, "P"]:
    """Returns the angle by which each pair of channels turns from one token to the next.

    Without scaling, pair i turns by theta^(-2i / head_dim).
    """
    exponents_P = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    plain_P = 1.0 / (config.rope_theta**exponents_P)
    match config.rope_scaling:
        case "none":
            return plain_P
        case "linear":
            return plain_P / config.rope_factor
        case "llama3":
            # The share of the plain frequency in the result grows with the number of turns that a
            # pair makes within the original context.
            low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
            turns_P = config.rope_original_len / (2 * math.pi / plain_P)
            share_P = jnp.clip((turns_P - low) / (high - low), 0.0, 1.0)
            return (1 - share_P) * plain_P / config.rope_factor + share_P * plain_P
        case _:
            assert_never(config.rope_scaling)


def rotation(positions_BT: Int[Array, "B T"], config: ModelConfig) -> Rotation:
    """Returns the rotation of each pair by the angle position * frequency."""
    frequencies_P = frequencies(config)
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
