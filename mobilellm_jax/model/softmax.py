"""Softmax attention in plain JAX; a quantized model replaces its two matrix multiplications.

`attend` is the one definition of softmax(q k^T / sqrt(H)) v for any mask. Decoding with a cache,
scoring, 8-bit attention and the StableHLO export use this function. `causal_attention` (named `xla`
in the config) and `attention_kernels.py` compute the same function faster for whole sequences.
Tests compare their results with `attend`.

The code normalises the softmax after the multiplication with v. So it divides T x H numbers instead
of T x S numbers. On a CPU, one pass over the T x S scores takes longer than the multiplications
that computed the scores.

`causal_attention` takes one block of queries at a time. A block of queries sees only the keys up to
its own last token, so nearly half of the scores are never computed. Memory holds the scores of one
block at a time. The backward pass recomputes the softmax weights with the normaliser that the
forward pass kept (Dao et al. 2022, arXiv:2205.14135). The block sizes suit XLA's CPU backend.
Forward and backward pass of the 125M model's attention at 2 x 512 tokens take 41 ms in float32 and
66 ms in bfloat16 with `attend`, but only 22 ms and 20 ms with `causal_attention` (two Zen 4 cores).
Remove `causal_attention` when `jax.nn.dot_product_attention` has an implementation for CPUs that is
as fast and keeps no T x T scores.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

SAVED = "attention"
"""The checkpoint name of the forward results that a backward pass needs (`layer_sharing.py`)."""

ATTENTION_PRODUCTS = "products"
"""The name under which quantized parameters hold the `AttentionProducts` of their attention."""

_LOWEST = np.finfo(np.float32).min  # The score of a key that the mask hides.
_MOST_BLOCKS, _SMALLEST_BLOCK = 8, 128

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]  # Keys or values.
Rows = Any
"""Keys or values in a cache: an array, or a pytree of arrays with the method `astype`."""

_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


@struct.dataclass
class AttentionProducts:
    """Multiplies the matrices of attention in floating point, and defines the format of cache rows.

    `quantize/attention.py` has the 8-bit version, which a quantized model carries in its
    parameters.
    """

    @property
    def fast_attention(self) -> bool:
        """Whether kernels and `causal_attention` compute the same numbers as these methods."""
        return True

    def scores(
        self, q_GTH: Float[Array, "*lead G T H"], k_SH: Float[Array, "*lead S H"]
    ) -> Float[Array, "*lead G T S"]:
        """Returns q k^T in float32."""
        return _per_pair(q_GTH, k_SH)

    def average(
        self, weights_GTS: Float[Array, "*lead G T S"], v_SH: Float[Array, "*lead S H"]
    ) -> Float[Array, "*lead G T H"]:
        """Returns the sums of weights * v over the keys in float32."""
        return _per_query(weights_GTS.astype(v_SH.dtype), v_SH)

    def rounded(self, x_BTKH: Keys) -> Keys:
        """Returns keys or values with the rounding of a cache."""
        return x_BTKH

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

    `*lead` stands for the axes of batch and key heads, or for one axis that combines both. Scores
    and softmax are float32.
    """
    out_GTH, _, _ = _softmax_average(q_GTH, k_SH, v_SH, mask_GTS, products)
    return out_GTH.astype(q_GTH.dtype)


def attend_by_token(
    q_BTNH: Queries,
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "#B T S"],
    products: AttentionProducts = IN_FLOAT,
) -> Queries:
    """Computes `attend` for arrays whose second axis is the position; N = K * G query heads."""
    q_BKGTH = _by_kv_head(q_BTNH, k_BSKH.shape[2])
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    return _by_token(attend(q_BKGTH, k_BKSH, v_BKSH, mask_BTS[:, None, None], products))


def causal_mask(
    length: int, segments_BT: Int[Array, "B T"] | None, first: int = 0
) -> Bool[Array, "#B C S"]:
    """Returns the mask that lets a query see itself and the earlier tokens of its segment.

    The queries are at positions `first` to `length` - 1, and the keys are at positions 0 to
    `length` - 1.
    """
    keys_S, queries_C = jnp.arange(length), jnp.arange(first, length)
    mask_BCS = (keys_S[None, :] <= queries_C[:, None])[None]
    if segments_BT is not None:
        mask_BCS &= segments_BT[:, first:length, None] == segments_BT[:, None, :length]
    return mask_BCS


@jax.custom_vjp
def causal_attention(
    q_BTNH: Queries, k_BTKH: Keys, v_BTKH: Keys, segments_BT: Int[Array, "B T"] | None
) -> Queries:
    """Returns softmax(q k^T / sqrt(H)) v under a causal mask within segments.

    G = N / K neighbouring query heads share a key head. Scores, softmax and sums are float32. The
    result has the type of the operands.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT)[0]


def _forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None
) -> tuple[jax.Array, _Residuals]:
    num_kv_heads, head_dim = k_BTKH.shape[2:]
    q_BKGTH = _by_kv_head(q_BTNH, num_kv_heads)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    outs, normalizers = [], []
    for block in _blocks(q_BTNH.shape[1]):
        q_BKGCH = q_BKGTH[:, :, :, block]
        k_BKSH, v_BKSH = k_BKTH[:, :, : block.stop], v_BKTH[:, :, : block.stop]
        mask_BCS = causal_mask(block.stop, segments_BT, block.start)
        out_BKGCH, highest_BKGC1, total_BKGC1 = _softmax_average(
            q_BKGCH, k_BKSH, v_BKSH, mask_BCS[:, None, None], IN_FLOAT
        )
        outs.append(out_BKGCH)
        normalizers.append(highest_BKGC1 * head_dim**-0.5 + jnp.log(total_BKGC1))
    out_BTNH = _by_token(jnp.concatenate(outs, axis=3)).astype(q_BTNH.dtype)
    out_BTNH = checkpoint_name(out_BTNH, SAVED)
    normalizer_BKGT1 = checkpoint_name(jnp.concatenate(normalizers, axis=3), SAVED)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, normalizer_BKGT1)


def _backward(
    residuals: _Residuals, grad_out_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, normalizer_BKGT1 = residuals
    length, dtype = q_BTNH.shape[1], q_BTNH.dtype
    num_kv_heads, head_dim = k_BTKH.shape[2:]
    q_BKGTH = _by_kv_head(q_BTNH, num_kv_heads)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    grad_out_BKGTH = _by_kv_head(grad_out_BTNH.astype(dtype), num_kv_heads)
    # Two sums are equal: weights * grad_weights over the keys, and out * grad_out over H. The
    # second sum needs no T x T array.
    product_BTNH = grad_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)
    mean_BKGT1 = _by_kv_head(jnp.sum(product_BTNH, axis=-1, keepdims=True), num_kv_heads)

    grads_q = []
    grad_k_BKTH = grad_v_BKTH = jnp.zeros((), jnp.float32)
    for block in _blocks(length):
        k_BKSH, v_BKSH = k_BKTH[:, :, : block.stop], v_BKTH[:, :, : block.stop]
        q_BKGCH, grad_out_BKGCH = q_BKGTH[:, :, :, block], grad_out_BKGTH[:, :, :, block]
        mask_BCS = causal_mask(block.stop, segments_BT, block.start)
        scores_BKGCS = _masked(_per_pair(q_BKGCH, k_BKSH), mask_BCS[:, None, None])
        weights_BKGCS = jnp.exp(scores_BKGCS * head_dim**-0.5 - normalizer_BKGT1[:, :, :, block])
        grad_weights_BKGCS = _per_pair(grad_out_BKGCH, v_BKSH)
        grad_scores_BKGCS = weights_BKGCS * (grad_weights_BKGCS - mean_BKGT1[:, :, :, block])
        grad_scores_BKGCS = (grad_scores_BKGCS * head_dim**-0.5).astype(dtype)
        grads_q.append(_per_query(grad_scores_BKGCS, k_BKSH))
        later = [(0, 0), (0, 0), (0, length - block.stop), (0, 0)]
        grad_k_BKTH += jnp.pad(_per_key(grad_scores_BKGCS, q_BKGCH), later)
        grad_v_BKTH += jnp.pad(_per_key(weights_BKGCS.astype(dtype), grad_out_BKGCH), later)
    grad_q_BTNH = _by_token(jnp.concatenate(grads_q, axis=3)).astype(dtype)
    grad_k_BTKH, grad_v_BTKH = grad_k_BKTH.swapaxes(1, 2), grad_v_BKTH.swapaxes(1, 2)
    return grad_q_BTNH, grad_k_BTKH.astype(k_BTKH.dtype), grad_v_BTKH.astype(v_BTKH.dtype), None


causal_attention.defvjp(_forward, _backward)


def _blocks(length: int) -> list[slice]:
    """Cuts the queries into blocks; more blocks waste fewer scores, but enlarge the program."""
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and mesh.shape.get("sequence", 1) > 1
    # If the mesh splits the sequence, all queries form one block. A smaller block would lie on one
    # device, and the other devices would wait.
    count = 1 if split else max(1, min(_MOST_BLOCKS, length // _SMALLEST_BLOCK))
    size = -(-length // count)
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]


def _softmax_average(
    q_GTH: jax.Array,
    k_SH: jax.Array,
    v_SH: jax.Array,
    mask_GTS: jax.Array,
    products: AttentionProducts,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns softmax(q k^T / sqrt(H)) v, the highest score and the softmax denominator."""
    scores_GTS = _masked(products.scores(q_GTH, k_SH), mask_GTS)
    highest_GT1 = jax.lax.stop_gradient(jnp.max(scores_GTS, axis=-1, keepdims=True))
    weights_GTS = jnp.exp((scores_GTS - highest_GT1) * q_GTH.shape[-1] ** -0.5)
    total_GT1 = jnp.sum(weights_GTS, axis=-1, keepdims=True)
    return products.average(weights_GTS, v_SH) / total_GT1, highest_GT1, total_GT1


def _masked(scores_GTS: jax.Array, mask_GTS: jax.Array) -> jax.Array:
    return jnp.where(mask_GTS, scores_GTS, _LOWEST)


def _by_kv_head(x_BTNH: Queries, num_kv_heads: int) -> Float[Array, "B K G T H"]:
    """Groups the query heads by the key head that they share."""
    batch, length, num_heads, head_dim = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return x_BTKGH.transpose(0, 2, 3, 1, 4)


def _by_token(x_BKGTH: Float[Array, "B K G T H"]) -> Queries:
    """Inverts `_by_kv_head`."""
    batch, kv_heads, group, length, head_dim = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


# In the next functions, the T queries of the G heads of a group are the rows (M) of one matrix
# multiplication per key head.


def _per_pair(a_GTH: jax.Array, b_SH: jax.Array) -> jax.Array:
    """Returns the dot products [*lead, G, T, S] of every query with every key."""
    pairs_MS = _product("...MH,...SH->...MS", _as_rows(a_GTH), b_SH)
    return pairs_MS.reshape(*a_GTH.shape[:-1], b_SH.shape[-2])


def _per_query(a_GTS: jax.Array, b_SH: jax.Array) -> jax.Array:
    """Returns, for every query, the sums [*lead, G, T, H] of a * b over the keys."""
    sums_MH = _product("...MS,...SH->...MH", _as_rows(a_GTS), b_SH)
    return sums_MH.reshape(*a_GTS.shape[:-1], b_SH.shape[-1])


def _per_key(a_GTS: jax.Array, b_GTH: jax.Array) -> jax.Array:
    """Returns, for every key, the sums [*lead, S, H] of a * b over all queries of a group."""
    return _product("...MS,...MH->...SH", _as_rows(a_GTS), _as_rows(b_GTH))


def _as_rows(x_GTX: jax.Array) -> jax.Array:
    *lead, group, length, width = x_GTX.shape
    return x_GTX.reshape(*lead, group * length, width)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
