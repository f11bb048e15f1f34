"""Causal attention of whole sequences in plain JAX (`xla`), a block of queries at a time.

A block sees only keys up to its own last one, so that nearly half of the scores are never computed,
and they exist for one block at a time, in the backward pass too: it computes them again from the
normaliser that the forward pass kept (Dao et al. 2022, arXiv:2205.14135). On a CPU, where a pass
over the T x T scores costs more than the product that made them, forward and backward together take
half of what they take for all queries at once.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mobilellm_jax.model.attention_kernels import SAVED

_MOST_BLOCKS, _SMALLEST_BLOCK = 8, 128

_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


@jax.custom_vjp
def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v over the tokens before and at each, of its own segment.

    G = N / K neighbouring query heads share a key head. Scores, softmax and sums are float32
    whatever the type of the operands, in which the result comes back.
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
        scores_BKGCS = _scores(q_BKGTH, k_BKTH, segments_BT, block)
        highest_BKGC1 = jnp.max(scores_BKGCS, axis=-1, keepdims=True)
        weights_BKGCS = jnp.exp((scores_BKGCS - highest_BKGC1) * head_dim**-0.5)
        total_BKGC1 = jnp.sum(weights_BKGCS, axis=-1, keepdims=True)
        # Normalised after the product, on H numbers per query instead of S.
        out_BKGCH = _per_query(weights_BKGCS.astype(v_BKTH.dtype), v_BKTH[:, :, : block.stop])
        outs.append(out_BKGCH / total_BKGC1)
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
    # sum_S(weights * d weights) of every query, without its weights.
    product_BTNH = grad_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)
    mean_BKGT1 = _by_kv_head(jnp.sum(product_BTNH, axis=-1, keepdims=True), num_kv_heads)

    grads_q = []
    grad_k_BKTH = grad_v_BKTH = jnp.zeros((), jnp.float32)
    for block in _blocks(length):
        k_BKSH, v_BKSH = k_BKTH[:, :, : block.stop], v_BKTH[:, :, : block.stop]
        q_BKGCH, grad_out_BKGCH = q_BKGTH[:, :, :, block], grad_out_BKGTH[:, :, :, block]
        scores_BKGCS = _scores(q_BKGTH, k_BKTH, segments_BT, block)
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
    """Cuts the queries; more blocks waste fewer scores and make a larger program."""
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and mesh.shape.get("sequence", 1) > 1
    # Split over devices, the queries stay whole: a block would be the work of one device.
    count = 1 if split else max(1, min(_MOST_BLOCKS, length // _SMALLEST_BLOCK))
    size = -(-length // count)
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]


def _scores(
    q_BKGTH: jax.Array, k_BKTH: jax.Array, segments_BT: jax.Array | None, block: slice
) -> Float[Array, "B K G C S"]:
    """Returns q k^T of a block of C queries and the S keys up to its end; hidden ones lowest."""
    scores_BKGCS = _per_pair(q_BKGTH[:, :, :, block], k_BKTH[:, :, : block.stop])
    keys_S, queries_C = jnp.arange(block.stop), jnp.arange(block.start, block.stop)
    mask_BCS = (keys_S[None, :] <= queries_C[:, None])[None]
    if segments_BT is not None:
        mask_BCS &= segments_BT[:, block, None] == segments_BT[:, None, : block.stop]
    return jnp.where(mask_BCS[:, None, None], scores_BKGCS, np.finfo(np.float32).min)


def _by_kv_head(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    batch, length, num_heads, head_dim = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return x_BTKGH.transpose(0, 2, 3, 1, 4)


def _by_token(x_BKGTH: jax.Array) -> jax.Array:
    batch, _, _, length, head_dim = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, head_dim)


# The G heads of a group and their C queries are the rows of one matrix product per key head.


def _per_pair(a_BKGCH: jax.Array, b_BKSH: jax.Array) -> Float[Array, "B K G C S"]:
    pairs_BKMS = _product("BKMH,BKSH->BKMS", _rows(a_BKGCH), b_BKSH)
    return pairs_BKMS.reshape(*a_BKGCH.shape[:4], b_BKSH.shape[2])


def _per_query(a_BKGCS: jax.Array, b_BKSH: jax.Array) -> Float[Array, "B K G C H"]:
    sums_BKMH = _product("BKMS,BKSH->BKMH", _rows(a_BKGCS), b_BKSH)
    return sums_BKMH.reshape(*a_BKGCS.shape[:4], b_BKSH.shape[3])


def _per_key(a_BKGCS: jax.Array, b_BKGCH: jax.Array) -> Float[Array, "B K S H"]:
    return _product("BKMS,BKMH->BKSH", _rows(a_BKGCS), _rows(b_BKGCH))


def _rows(x_BKGCX: jax.Array) -> jax.Array:
    return x_BKGCX.reshape(*x_BKGCX.shape[:2], -1, x_BKGCX.shape[4])


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
