"""Keys and values of earlier tokens, one slot per block APPLICATION.

A shared block sees different inputs at each of its applications, so each application needs keys
and values of its own: U * R slots, in order of application, as in the unshared model with copied
layers. (The paper's own code writes both applications of a block into one slot, which is why its
shared models decode without a cache.)
"""

import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobilellm_jax.config import ModelConfig


@struct.dataclass
class KVCache:
    """Rotated keys and values, and how many tokens of each row are valid."""

    k_LBSKH: Float[Array, "L B S K H"]
    v_LBSKH: Float[Array, "L B S K H"]
    length_B: Int[Array, "B"]


def init_cache(config: ModelConfig, batch: int, max_len: int, dtype: DTypeLike) -> KVCache:
    """Returns an empty cache for `batch` rows of at most `max_len` tokens."""
    shape = (config.applied_depth, batch, max_len, config.num_kv_heads, config.head_dim)
    return KVCache(
        k_LBSKH=jnp.zeros(shape, dtype),
        v_LBSKH=jnp.zeros(shape, dtype),
        length_B=jnp.zeros((batch,), jnp.int32),
    )
