"""Causal attention of whole sequences in plain JAX (`xla`), one block of queries at a time.

A block of queries sees only the keys up to its own last token, so nearly half of the scores are
never computed. The scores of one block exist at a time. The backward pass computes them again from
the normaliser that the forward pass kept (Dao et al. 2022, arXiv:2205.14135).

The blocks are shaped for XLA's CPU backend, where a pass over the T x T scores costs more than the
product that made them. Forward and backward of the 125M model's attention at 2 x 512 tokens took 41
ms in float32 and 66 ms in bfloat16 with `softmax.attend`, and take 22 ms and 20 ms here (two Zen 4
cores). Accelerators have the kernels of `attention_kernels.py`. Remove this file when
`jax.nn.dot_product_attention` has an implementation for CPUs that is as fast and keeps no T x T
scores.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mobilellm_jax.model.attention_kernels import SAVED
from mobilellm_jax.model.softmax import (
    LOWEST,
    by_kv_head,
    by_token,
    per_key,
    per_pair,
    per_query,
)

_MOST_BLOCKS, _SMALLEST_BLOCK = 8, 128

_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


@jax.custom_vjp
def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k^T / sqrt(H)) v under a causal mask within segments.

    G = N / K neighbouring query heads share a key head. Scores, softmax and sums are float32. The
    result has the type of the operands.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT)[0]


def _forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None
) -> tuple[jax.Array, _Residuals]:
    num_kv_heads, head_dim = k_BTKH.shape[2:]
    q_BKGTH = by_kv_head(q_BTNH, num_kv_heads)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    outs, normalizers = [], []
    for block in _blocks(q_BTNH.shape[1]):
        scores_BKGCS = _scores(q_BKGTH, k_BKTH, segments_BT, block)
        highest_BKGC1 = jnp.max(scores_BKGCS, axis=-1, keepdims=True)
        weights_BKGCS = jnp.exp((scores_BKGCS - highest_BKGC1) * head_dim**-0.5)
        total_BKGC1 = jnp.sum(weights_BKGCS, axis=-1, keepdims=True)
        # Dividing after the product takes H divisions per query instead of S.
        out_BKGCH = per_query(weights_BKGCS.astype(v_BKTH.dtype), v_BKTH[:, :, : block.stop])
        outs.append(out_BKGCH / total_BKGC1)
        normalizers.append(highest_BKGC1 * head_dim**-0.5 + jnp.log(total_BKGC1))
    out_BTNH = by_token(jnp.concatenate(outs, axis=3)).astype(q_BTNH.dtype)
    out_BTNH = checkpoint_name(out_BTNH, SAVED)
    normalizer_BKGT1 = checkpoint_name(jnp.concatenate(normalizers, axis=3), SAVED)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, normalizer_BKGT1)


def _backward(
    residuals: _Residuals, grad_out_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, normalizer_BKGT1 = residuals
    length, dtype = q_BTNH.shape[1], q_BTNH.dtype
    num_kv_heads, head_dim = k_BTKH.shape[2:]
    q_BKGTH = by_kv_head(q_BTNH, num_kv_heads)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    grad_out_BKGTH = by_kv_head(grad_out_BTNH.astype(dtype), num_kv_heads)
    # The sum over the keys of weights * grad_weights equals the sum over H of out * grad_out.
    product_BTNH = grad_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)
    mean_BKGT1 = by_kv_head(jnp.sum(product_BTNH, axis=-1, keepdims=True), num_kv_heads)

    grads_q = []
    grad_k_BKTH = grad_v_BKTH = jnp.zeros((), jnp.float32)
    for block in _blocks(length):
        k_BKSH, v_BKSH = k_BKTH[:, :, : block.stop], v_BKTH[:, :, : block.stop]
        q_BKGCH, grad_out_BKGCH = q_BKGTH[:, :, :, block], grad_out_BKGTH[:, :, :, block]
        scores_BKGCS = _scores(q_BKGTH, k_BKTH, segments_BT, block)
        weights_BKGCS = jnp.exp(scores_BKGCS * head_dim**-0.5 - normalizer_BKGT1[:, :, :, block])
        grad_weights_BKGCS = per_pair(grad_out_BKGCH, v_BKSH)
        grad_scores_BKGCS = weights_BKGCS * (grad_weights_BKGCS - mean_BKGT1[:, :, :, block])
        grad_scores_BKGCS = (grad_scores_BKGCS * head_dim**-0.5).astype(dtype)
        grads_q.append(per_query(grad_scores_BKGCS, k_BKSH))
        later = [(0, 0), (0, 0), (0, length - block.stop), (0, 0)]
        grad_k_BKTH += jnp.pad(per_key(grad_scores_BKGCS, q_BKGCH), later)
        grad_v_BKTH += jnp.pad(per_key(weights_BKGCS.astype(dtype), grad_out_BKGCH), later)
    grad_q_BTNH = by_token(jnp.concatenate(grads_q, axis=3)).astype(dtype)
    grad_k_BTKH, grad_v_BTKH = grad_k_BKTH.swapaxes(1, 2), grad_v_BKTH.swapaxes(1, 2)
    return grad_q_BTNH, grad_k_BTKH.astype(k_BTKH.dtype), grad_v_BTKH.astype(v_BTKH.dtype), None


causal_attention.defvjp(_forward, _backward)


def _blocks(length: int) -> list[slice]:
    """Cuts the queries into blocks; more blocks waste fewer scores and make a larger program."""
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and mesh.shape.get("sequence", 1) > 1
    # On a mesh that splits the sequence, one block would be the work of one device alone.
    count = 1 if split else max(1, min(_MOST_BLOCKS, length // _SMALLEST_BLOCK))
    size = -(-length // count)
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]


def _scores(
    q_BKGTH: jax.Array, k_BKTH: jax.Array, segments_BT: jax.Array | None, block: slice
) -> Float[Array, "B K G C S"]:
    """Returns q k^T of a block of C queries and the S keys up to its end, masked."""
    scores_BKGCS = per_pair(q_BKGTH[:, :, :, block], k_BKTH[:, :, : block.stop])
    keys_S, queries_C = jnp.arange(block.stop), jnp.arange(block.start, block.stop)
    mask_BCS = (keys_S[None, :] <= queries_C[:, None])[None]
    if segments_BT is not None:
        mask_BCS &= segments_BT[:, block, None] == segments_BT[:, None, : block.stop]
    return jnp.where(mask_BCS[:, None, None], scores_BKGCS, LOWEST)
