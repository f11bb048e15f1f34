"""Grouped-query causal attention (paper Sec. 2.4; Ainslie et al. 2023, arXiv:2305.13245)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.attention_kernels import self_attention
from mobilellm_jax.model.blockwise_attention import causal_attention
from mobilellm_jax.model.cache import KVCache, read, written
from mobilellm_jax.model.parameters import attention_in_8_bits, matrix
from mobilellm_jax.model.products import product
from mobilellm_jax.model.quantized import tokens_on_levels
from mobilellm_jax.model.quantized_attention import attend_in_8_bits, causal_mask
from mobilellm_jax.model.rope import Rotation, rotate


@struct.dataclass
class AttentionContext:
    """What every layer of one forward pass shares."""

    rotation: Rotation
    positions_BT: Int[Array, "#B T"]  # where this call's tokens stand in the cache
    # True where the query may see the key; None: those before it of its segment. Always there with
    # a cache, never with a kernel.
    mask_BTS: Bool[Array, "#B T S"] | None = None
    segments_BT: Int[Array, "B T"] | None = None


def uses_kernel(config: ModelConfig) -> bool:
    """Returns whether whole sequences go to a kernel instead of `attend`, which is `xla`.

    An `auto` that nobody resolved (`on_device.py`) is `xla` too, which runs everywhere.
    """
    return config.attention not in ("auto", "xla")


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "#B T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v, with G = N / K neighbouring query heads per key head.

    For any mask: decoding with a cache, and scoring. Scores and softmax are float32 whatever the
    type of the operands. The G heads of a group and the T queries are the rows (M) of one matrix
    product per key head, and the softmax is normalised after the product with v, on T x H numbers
    instead of T x S: on a CPU both save passes over the scores, which cost more than the products.
    """
    batch, length, num_heads, head_dim = q_BTNH.shape
    keys, num_kv_heads = k_BSKH.shape[1:3]
    group = num_heads // num_kv_heads
    rows = group * length
    q_BTKGH = q_BTNH.reshape(batch, length, num_kv_heads, group, head_dim)
    q_BKMH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, rows, head_dim)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

    scores_BKMS = jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKMS.reshape(batch, num_kv_heads, group, length, keys)
    lowest = np.finfo(np.float32).min
    scores_BKGTS = jnp.where(mask_BTS[:, None, None, :, :], scores_BKGTS, lowest)
    highest_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
    weights_BKGTS = jnp.exp((scores_BKGTS - highest_BKGT1) * head_dim**-0.5)
    total_BKM1 = jnp.sum(weights_BKGTS, axis=-1).reshape(batch, num_kv_heads, rows, 1)

    weights_BKMS = weights_BKGTS.reshape(batch, num_kv_heads, rows, keys).astype(v_BSKH.dtype)
    out_BKMH = jnp.einsum(
        "BKMS,BKSH->BKMH", weights_BKMS, v_BKSH, preferred_element_type=jnp.float32
    )
    out_BKMH = (out_BKMH / total_BKM1).astype(q_BTNH.dtype)
    out_BKGTH = out_BKMH.reshape(batch, num_kv_heads, group, length, head_dim)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


class Attention(nn.Module):
    """Projects to heads, rotates, attends and projects back; no biases."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: AttentionContext,
        cache: KVCache | None,
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends among the T tokens given, or, with a cache, to what it holds and them.

        With a cache, the new keys and values are first written to `slot` at
        `context.positions_BT`, which the caller keeps within the cache's length.
        """
        config = self.config
        in_8_bits = attention_in_8_bits(self)
        width, head_dim = config.embed_dim, config.head_dim

        def project(name: str, heads: int, axis: str) -> Float[Array, "B T heads H"]:
            kernel_DNH = matrix(self, name, (width, heads, head_dim), ("embed", axis, "head_dim"))
            return product("BTD,DNH->BTNH", x_BTD, kernel_DNH)

        q_BTNH = rotate(project("query", config.num_heads, "heads"), context.rotation)
        k_BTKH = rotate(project("key", config.num_kv_heads, "kv_heads"), context.rotation)
        v_BTKH = project("value", config.num_kv_heads, "kv_heads")
        q_BTNH = nn.with_logical_constraint(q_BTNH, ("batch", "length", "heads", "head_dim"))

        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if in_8_bits.cache:  # without one too, so that a text costs what writing it would
            k_BSKH, v_BSKH = tokens_on_levels(k_BTKH), tokens_on_levels(v_BTKH)
        if cache is not None:
            cache = written(cache, slot, context.positions_BT, k_BTKH, v_BTKH)
            k_BSKH, v_BSKH = read(cache, slot, x_BTD.dtype)

        if in_8_bits.products:
            mask_BTS = context.mask_BTS
            if mask_BTS is None:
                mask_BTS = causal_mask(x_BTD.shape[1], context.segments_BT)
            out_BTNH = attend_in_8_bits(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
        elif context.mask_BTS is not None:
            out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, context.mask_BTS)
        elif uses_kernel(config):
            segments_BT = context.segments_BT
            out_BTNH = self_attention(config.attention, q_BTNH, k_BSKH, v_BSKH, segments_BT)
        else:
            out_BTNH = causal_attention(q_BTNH, k_BSKH, v_BSKH, context.segments_BT)
        shape, axes = (config.num_heads, head_dim, width), ("heads", "head_dim", "embed")
        kernel_NHD = matrix(self, "output", shape, axes)
        return product("BTNH,NHD->BTD", out_BTNH, kernel_NHD), cache
