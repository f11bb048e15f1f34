"""Keys and values of earlier tokens, with one slot per block APPLICATION.

A shared block sees different inputs at each of its applications, so each application needs its own
keys and values. The cache therefore has U * R slots, in order of application, like the unshared
model with copied layers. (The paper's own code writes both applications of a block into one slot.
That is why its shared models decode without a cache.)

`KVCache` serves prefill, where a scan carries it. `AlignedCache` serves decoding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.attention import Attend
from mobilellm_jax.model.softmax import (
    IN_FLOAT,
    AttentionProducts,
    Keys,
    Queries,
    Rows,
    attend,
    attend_by_token,
)


@struct.dataclass
class KVCache:
    """Rotated keys and values, and the number of valid tokens of each row."""

    k_LBSKH: Rows
    v_LBSKH: Rows
    length_B: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        return int(jax.tree.leaves(self.k_LBSKH)[0].shape[2])


def init_cache(
    config: ModelConfig,
    batch: int,
    max_len: int,
    dtype: DTypeLike,
    products: AttentionProducts = IN_FLOAT,
) -> KVCache:
    """Returns an empty cache for `batch` rows of at most `max_len` tokens."""
    shape = (config.applied_depth, batch, max_len, config.num_kv_heads, config.head_dim)
    rows = jax.eval_shape(products.rows, jax.ShapeDtypeStruct(shape, dtype))
    k_LBSKH, v_LBSKH = (jax.tree.map(jnp.zeros_like, rows) for _ in range(2))
    return KVCache(k_LBSKH, v_LBSKH, length_B=jnp.zeros((batch,), jnp.int32))


def attend_with_cache(
    cache: KVCache,
    slot: Int[Array, ""],
    positions_BT: Int[Array, "B T"],
    mask_BTS: Bool[Array, "B T S"],
) -> Attend:
    """Returns attention to a slot of the cache, after writing the new keys and values to it.

    The caller keeps `positions_BT` within the capacity. The second result is the longer cache.
    """
    rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]

    def write(old: Rows, new: Rows) -> Rows:
        at = (slot, rows_B1, positions_BT)
        return jax.tree.map(lambda x, y: x.at[at].set(y.astype(x.dtype)), old, new)

    def attend(
        q_BTNH: Queries, k_BTKH: Keys, v_BTKH: Keys, products: AttentionProducts
    ) -> tuple[Queries, KVCache]:
        k_LBSKH = write(cache.k_LBSKH, products.rows(k_BTKH))
        v_LBSKH = write(cache.v_LBSKH, products.rows(v_BTKH))
        k_BSKH, v_BSKH = (_slot(rows, slot).astype(q_BTNH.dtype) for rows in (k_LBSKH, v_LBSKH))
        out_BTNH = attend_by_token(q_BTNH, k_BSKH, v_BSKH, mask_BTS, products)
        return out_BTNH, dataclasses.replace(cache, k_LBSKH=k_LBSKH, v_LBSKH=v_LBSKH)

    return attend


@struct.dataclass
class AlignedCache:
    """A cache for decoding, in which all rows end at the same place.

    Every slot is a separate array, so appending a token is one write per slot at the same place in
    all rows. A slot has the shape that the products of attention need, with one axis W = B * K for
    batch and key heads. A reshape between the two would make XLA copy the slot at every token.
    """

    k_WSH: tuple[Rows, ...]
    v_WSH: tuple[Rows, ...]
    start_B: Int[Array, "B"]  # place of each row's first token
    length: Int[Array, ""]  # place after the last token of all rows

    @property
    def capacity(self) -> int:
        """Number of places for tokens in a row, including the unused places before its start."""
        return int(jax.tree.leaves(self.k_WSH)[0].shape[1])


def align(cache: KVCache) -> AlignedCache:
    """Moves every row to the end of the longest row; places before a row's start are unused."""
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
        return tuple(_slot(moved_rows, slot) for slot in range(depth))

    return AlignedCache(
        k_WSH=slots(cache.k_LBSKH), v_WSH=slots(cache.v_LBSKH), start_B=start_B, length=length
    )


def attend_with_slot(
    k_WSH: Rows, v_WSH: Rows, at: Int[Array, ""], mask_W11S: Bool[Array, "W 1 1 S"]
) -> Attend:
    """Returns attention of one new token per row to a slot of an `AlignedCache`.

    The new keys and values are written at place `at` first. The second result is the slot's new
    keys and values.
    """

    def write(old: Rows, new_B1KH: Float[Array, "B 1 K H"], products: AttentionProducts) -> Rows:
        new_W1H = products.rows(new_B1KH.reshape(-1, 1, new_B1KH.shape[-1]))
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), at, axis=1),
            old,
            new_W1H,
        )

    def attend_to_slot(
        q_B1NH: Queries, k_B1KH: Keys, v_B1KH: Keys, products: AttentionProducts
    ) -> tuple[Queries, tuple[Rows, Rows]]:
        keys, values = write(k_WSH, k_B1KH, products), write(v_WSH, v_B1KH, products)
        batch, _, num_kv_heads, head_dim = k_B1KH.shape
        q_WG1H = q_B1NH.reshape(batch * num_kv_heads, -1, 1, head_dim)
        dtype = q_B1NH.dtype
        out_WG1H = attend(q_WG1H, keys.astype(dtype), values.astype(dtype), mask_W11S, products)
        return out_WG1H.reshape(q_B1NH.shape), (keys, values)

    return attend_to_slot


def _slot(rows: Rows, slot: int | Int[Array, ""]) -> Rows:
    return jax.tree.map(lambda x: x[slot], rows)
