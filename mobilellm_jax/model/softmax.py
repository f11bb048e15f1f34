"""Softmax attention in plain JAX, over two products that a quantized model replaces.

`attend` is the one definition of softmax(q k^T / sqrt(H)) v for any mask. It serves decoding with a
cache, scoring, 8-bit attention and the StableHLO export. `blockwise_attention.py` and
`attention_kernels.py` compute the same faster for whole sequences, and tests compare them with it.

The softmax is normalised after the product with v, so the division works on T x H numbers instead
of T x S. On a CPU a pass over the T x S scores costs more than the products that made them.
"""

import abc

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

LOWEST = np.finfo(np.float32).min
"""The score of a hidden key."""


class StoredRows(abc.ABC):
    """Keys or values in a cache that are not plain numbers, as a pytree."""

    @abc.abstractmethod
    def astype(self, dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
        """Returns the keys or values as floating-point numbers."""


Rows = Array | StoredRows
"""Keys or values in a cache."""


@struct.dataclass
class AttentionProducts:
    """The products of attention in floating point, and the form in which a cache keeps its rows.

    `quantize/attention.py` has the 8-bit version. A quantized model carries it in its parameters.
    """

    @property
    def fast_attention(self) -> bool:
        """Whether kernels and blockwise attention compute the same products."""
        return True

    def scores(
        self, q_GTH: Float[Array, "*lead G T H"], k_SH: Float[Array, "*lead S H"]
    ) -> Float[Array, "*lead G T S"]:
        """Returns q k^T in float32."""
        return per_pair(q_GTH, k_SH)

    def average(
        self, weights_GTS: Float[Array, "*lead G T S"], v_SH: Float[Array, "*lead S H"]
    ) -> Float[Array, "*lead G T H"]:
        """Returns the sums of v over S in float32, weighted."""
        return per_query(weights_GTS.astype(v_SH.dtype), v_SH)

    def rounded(self, x_BTKH: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
        """Returns keys or values as a cache would return them."""
        return x_BTKH

    def empty_rows(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Rows:
        """Returns the keys or the values of an empty cache."""
        return jnp.zeros(shape, dtype)

    def rows(self, x: Float[Array, "*rows H"]) -> Rows:
        """Returns keys or values in the form that the cache keeps."""
        return x


IN_FLOAT = AttentionProducts()


def attend(
    q_GTH: Float[Array, "*lead G T H"],
    k_SH: Float[Array, "*lead S H"],
    v_SH: Float[Array, "*lead S H"],
    mask_GTS: Bool[Array, "*masks #G #T S"],
    products: AttentionProducts,
) -> Float[Array, "*lead G T H"]:
    """Returns softmax(q k^T / sqrt(H)) v, where G query heads share a key head.

    The leading axes are batch and key heads, or both as one axis. Scores and softmax are float32.
    """
    scores_GTS = jnp.where(mask_GTS, products.scores(q_GTH, k_SH), LOWEST)
    highest_GT1 = jax.lax.stop_gradient(jnp.max(scores_GTS, axis=-1, keepdims=True))
    weights_GTS = jnp.exp((scores_GTS - highest_GT1) * q_GTH.shape[-1] ** -0.5)
    total_GT1 = jnp.sum(weights_GTS, axis=-1, keepdims=True)
    return (products.average(weights_GTS, v_SH) / total_GT1).astype(q_GTH.dtype)


def attend_by_token(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "#B T S"],
    products: AttentionProducts = IN_FLOAT,
) -> Float[Array, "B T N H"]:
    """Computes `attend` for arrays whose second axis is the position; N = K * G query heads."""
    q_BKGTH = by_kv_head(q_BTNH, k_BSKH.shape[2])
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    return by_token(attend(q_BKGTH, k_BKSH, v_BKSH, mask_BTS[:, None, None], products))


def causal_mask(length: int, segments_BT: Int[Array, "B T"] | None) -> Bool[Array, "#B T S"]:
    """Returns the mask of the tokens before each token and in its segment, itself included."""
    places_T = jnp.arange(length)
    mask_1TS = (places_T[None, :] <= places_T[:, None])[None]
    if segments_BT is None:
        return mask_1TS
    return mask_1TS & (segments_BT[:, :, None] == segments_BT[:, None, :])


def by_kv_head(x_BTNH: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K G T H"]:
    """Groups the query heads by the key head that they share."""
    batch, length, num_heads, head_dim = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return x_BTKGH.transpose(0, 2, 3, 1, 4)


def by_token(x_BKGTH: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    """Inverts `by_kv_head`."""
    batch, kv_heads, group, length, head_dim = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


# The G heads of a group and their T queries are the rows (M) of one matrix product per key head.


def per_pair(
    a_GTH: Float[Array, "*lead G T H"], b_SH: Float[Array, "*lead S H"]
) -> Float[Array, "*lead G T S"]:
    """Returns the products of every query and every key, summed over H."""
    pairs_MS = _product("...MH,...SH->...MS", _as_rows(a_GTH), b_SH)
    return pairs_MS.reshape(*a_GTH.shape[:-1], b_SH.shape[-2])


def per_query(
    a_GTS: Float[Array, "*lead G T S"], b_SH: Float[Array, "*lead S H"]
) -> Float[Array, "*lead G T H"]:
    """Returns the sums over the keys, for every query."""
    sums_MH = _product("...MS,...SH->...MH", _as_rows(a_GTS), b_SH)
    return sums_MH.reshape(*a_GTS.shape[:-1], b_SH.shape[-1])


def per_key(
    a_GTS: Float[Array, "*lead G T S"], b_GTH: Float[Array, "*lead G T H"]
) -> Float[Array, "*lead S H"]:
    """Returns the sums over the queries of all heads of a group, for every key."""
    return _product("...MS,...MH->...SH", _as_rows(a_GTS), _as_rows(b_GTH))


def _as_rows(x_GTX: jax.Array) -> jax.Array:
    *lead, group, length, width = x_GTX.shape
    return x_GTX.reshape(*lead, group * length, width)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
