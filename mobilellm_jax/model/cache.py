"""Keys and values of earlier tokens, with one slot for each application of a block.

A shared block sees different inputs at each of its applications, so each application needs its own
keys and values. The cache therefore has U * R slots in the order of application, like the cache of
a model with U * R layers that share no weights. (The paper's own code writes both applications of a
block into one slot. Therefore the paper's code decodes models with shared layers without a cache.)

`KVCache` is for reading prompts (prefill), where the scan over the blocks carries the cache.
`AlignedCache` is for decoding.
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

    k_LBSKH: Rows  # Rotated keys.
    v_LBSKH: Rows  # Values.
    length_B: Int[Array, "B"]  # Number of valid tokens of each row.

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
    """Returns an `Attend` that writes new keys and values to a cache slot and then reads the slot.

    The caller keeps `positions_BT` within the capacity. The second result of the `Attend` is the
    cache with the new tokens.
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
    """A cache for decoding, in which all rows end at the same index of the axis S.

    Every slot is a separate array. So a new token takes one write per slot, at the same index of
    all rows. A slot has the shape that the matrix multiplications of attention need, in which one
    axis W = B * K combines batch and key heads. With separate axes B and K, a reshape before
    attention would make XLA copy the slot at every token.
    """

    k_WSH: tuple[Rows, ...]  # Rotated keys of every slot.
    v_WSH: tuple[Rows, ...]  # Values of every slot.
    start_B: Int[Array, "B"]  # Index of each row's first token.
    length: Int[Array, ""]  # Index after the last token of all rows.

    @property
    def capacity(self) -> int:
        """Length of the axis S, including the unused entries before the start of a row."""
        return int(jax.tree.leaves(self.k_WSH)[0].shape[1])


def align(cache: KVCache) -> AlignedCache:
    """Shifts every row so that all rows end at the same index; entries before a row are unused."""
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
    """Returns an `Attend` for one new token per row, which sees a slot of an `AlignedCache`.

    The `Attend` first writes the new keys and values at index `at` of the slot. Its second result
    is the updated keys and values of the slot.
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
