"""Keys and values of earlier tokens, one slot per block APPLICATION.

A shared block sees different inputs at each of its applications, so each application needs keys
and values of its own: U * R slots, in order of application, as in the unshared model with copied
layers. (The paper's own code writes both applications of a block into one slot, which is why its
shared models decode without a cache.)
"""

import functools

import jax
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


@struct.dataclass
class AlignedCache:
    """The same for decoding: rows end at the same place, and every slot is an array of its own.

    So one token more is one write per slot, at the same place in all rows. Slots have the shape
    that their matrix products want, W = B * K: with a reshape between, XLA copies them.
    """

    k_WSH: tuple[Float[Array, "W S H"], ...]
    v_WSH: tuple[Float[Array, "W S H"], ...]
    start_B: Int[Array, "B"]  # where each row's first token lies
    length: Int[Array, ""]  # where all rows end


def align(cache: KVCache) -> AlignedCache:
    """Moves every row to the end of the longest; what lies before its start has no meaning."""
    length = jnp.max(cache.length_B)
    start_B = length - cache.length_B
    _, batch, capacity, heads, head_dim = cache.k_LBSKH.shape

    def slots(rows_LBSKH: Float[Array, "L B S K H"]) -> tuple[Float[Array, "W S H"], ...]:
        rows_BLKSH = rows_LBSKH.transpose(1, 0, 3, 2, 4)
        moved_BLKSH = jax.vmap(functools.partial(jnp.roll, axis=2))(rows_BLKSH, start_B)
        moved_LWSH = moved_BLKSH.swapaxes(0, 1).reshape(-1, batch * heads, capacity, head_dim)
        return tuple(moved_LWSH[slot] for slot in range(moved_LWSH.shape[0]))

    return AlignedCache(
        k_WSH=slots(cache.k_LBSKH), v_WSH=slots(cache.v_LBSKH), start_B=start_B, length=length
    )
