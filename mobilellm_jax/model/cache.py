"""Keys and values of earlier tokens, one slot per block APPLICATION.

A shared block sees different inputs at each of its applications, so each application needs keys
and values of its own: U * R slots, in order of application, as in the unshared model with copied
layers. (The paper's own code writes both applications of a block into one slot, which is why its
shared models decode without a cache.)
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.quantized import QuantizedRows, to_rows

Rows = Array | QuantizedRows
"""Keys or values; in 8 bits, those of a head share a scale at each place."""


@struct.dataclass
class KVCache:
    """Rotated keys and values, and how many tokens of each row are valid."""

    k_LBSKH: Rows
    v_LBSKH: Rows
    length_B: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return jax.tree.leaves(self.k_LBSKH)[0].shape[2]  # type: ignore[no-any-return]  # untyped


def init_cache(config: ModelConfig, batch: int, max_len: int, dtype: DTypeLike) -> KVCache:
    """Returns an empty cache for `batch` rows of at most `max_len` tokens.

    With int8 as its type it keeps quantized keys and values, and scales.
    """
    shape = (config.applied_depth, batch, max_len, config.num_kv_heads, config.head_dim)

    def empty() -> Rows:
        if dtype != jnp.int8:
            return jnp.zeros(shape, dtype)
        return QuantizedRows(jnp.zeros(shape, dtype), jnp.zeros((*shape[:-1], 1), jnp.float32))

    return KVCache(k_LBSKH=empty(), v_LBSKH=empty(), length_B=jnp.zeros((batch,), jnp.int32))


def written(
    cache: KVCache,
    slot: Int[Array, ""],
    positions_BT: Int[Array, "#B T"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
) -> KVCache:
    """Returns the cache with the keys and values in a slot, in the form that it keeps."""
    rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]

    def write(there: Rows, new_BTKH: Float[Array, "B T K H"]) -> Rows:
        new = to_rows(new_BTKH) if isinstance(there, QuantizedRows) else new_BTKH
        at = (slot, rows_B1, positions_BT)
        return cast(Rows, jax.tree.map(lambda x, y: x.at[at].set(y.astype(x.dtype)), there, new))

    return dataclasses.replace(
        cache, k_LBSKH=write(cache.k_LBSKH, k_BTKH), v_LBSKH=write(cache.v_LBSKH, v_BTKH)
    )


def read(
    cache: KVCache, slot: Int[Array, ""], dtype: DTypeLike
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns the keys and values of a slot."""
    k_BSKH, v_BSKH = (_of_slot(rows, slot) for rows in (cache.k_LBSKH, cache.v_LBSKH))
    return as_floats(k_BSKH, dtype), as_floats(v_BSKH, dtype)


def as_floats(rows: Rows, dtype: DTypeLike) -> Float[Array, "..."]:
    """Returns what the rows stand for."""
    return rows.dequantized(dtype) if isinstance(rows, QuantizedRows) else rows.astype(dtype)


@struct.dataclass
class AlignedCache:
    """The same for decoding: rows end at the same place, and every slot is an array of its own.

    So one token more is one write per slot, at the same place in all rows. Slots have the shape
    that their matrix products want, W = B * K: with a reshape between, XLA copies them.
    """

    k_WSH: tuple[Rows, ...]
    v_WSH: tuple[Rows, ...]
    start_B: Int[Array, "B"]  # where each row's first token lies
    length: Int[Array, ""]  # where all rows end

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold, its start included."""
        return jax.tree.leaves(self.k_WSH)[0].shape[1]  # type: ignore[no-any-return]  # untyped


def align(cache: KVCache) -> AlignedCache:
    """Moves every row to the end of the longest; what lies before its start has no meaning."""
    length = jnp.max(cache.length_B)
    start_B = length - cache.length_B

    def moved(rows_LBSKH: Shaped[Array, "L B S K H"]) -> Shaped[Array, "L W S H"]:
        depth, _, capacity, _, width = rows_LBSKH.shape
        rows_BLKSH = rows_LBSKH.transpose(1, 0, 3, 2, 4)
        moved_BLKSH = jax.vmap(functools.partial(jnp.roll, axis=2))(rows_BLKSH, start_B)
        return moved_BLKSH.swapaxes(0, 1).reshape(depth, -1, capacity, width)

    def slots(rows: Rows) -> tuple[Rows, ...]:
        moved_rows = jax.tree.map(moved, rows)
        depth = jax.tree.leaves(moved_rows)[0].shape[0]
        return tuple(_of_slot(moved_rows, slot) for slot in range(depth))

    return AlignedCache(
        k_WSH=slots(cache.k_LBSKH), v_WSH=slots(cache.v_LBSKH), start_B=start_B, length=length
    )


def _of_slot(rows: Rows, slot: int | Int[Array, ""]) -> Rows:
    return cast(Rows, jax.tree.map(lambda x: x[slot], rows))
