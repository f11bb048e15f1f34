"""Attention whose products are those of 8-bit integers.

Queries and keys have a scale per token and head. Values do too, and they are what is summed over,
so that their scales cannot be taken out of the sum: they are multiplied into the softmax's weights,
and those then share a scale per query. Nothing looks at tokens that the mask hides.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mobilellm_jax.model.quantized import integer_einsum, to_rows


def causal_mask(length: int, segments_BT: Int[Array, "B T"] | None) -> Bool[Array, "#B T T"]:
    """Returns which tokens each may attend to: those before it, of its own segment."""
    places_T = jnp.arange(length)
    mask_1TT = (places_T[None, :] <= places_T[:, None])[None]
    if segments_BT is None:
        return mask_1TT
    return mask_1TT & (segments_BT[:, :, None] == segments_BT[:, None, :])


def attend_in_8_bits(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "#B T S"],
) -> Float[Array, "B T N H"]:
    """`attention.attend` with integer products; softmax and scales are float32."""
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, num_kv_heads, -1, head_dim)
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    q, k, v = (to_rows(x) for x in (q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)))

    def over_keys(scale_BKS1: Float[Array, "B K S 1"]) -> Float[Array, "B K 1 1 S"]:
        return scale_BKS1.swapaxes(2, 3)[:, :, None]

    scores_BKGTS = integer_einsum("BKGTH,BKSH->BKGTS", q.values, k.values).astype(jnp.float32)
    scores_BKGTS = scores_BKGTS * q.scale * over_keys(k.scale)
    lowest = np.finfo(np.float32).min
    scores_BKGTS = jnp.where(mask_BTS[:, None, None, :, :], scores_BKGTS, lowest)
    highest_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    weights_BKGTS = jnp.exp((scores_BKGTS - highest_BKGT1) * head_dim**-0.5)
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)

    weights = to_rows(weights_BKGTS * over_keys(v.scale))
    sums_BKGTH = integer_einsum("BKGTS,BKSH->BKGTH", weights.values, v.values)
    out_BKGTH = sums_BKGTH.astype(jnp.float32) * weights.scale / total_BKGT1
    out_BTKGH = out_BKGTH.transpose(0, 3, 1, 2, 4)
    return out_BTKGH.reshape(batch, length, num_heads, head_dim).astype(q_BTNH.dtype)
