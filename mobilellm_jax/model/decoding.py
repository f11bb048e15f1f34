"""One token more for every row of a batch: the model as decoding needs it.

Reading weights is all that decoding takes time for, so they are laid out for it once. The stacked
parameters of the blocks, which a scan would copy out of the stack for every token, become arrays of
their own; products with the same input become one; the head lies as the product reads it. The
layers are unrolled, each with its own slot in the cache.

The same function as `Transformer`, which a test holds for every position and sharing order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.cache import AlignedCache
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.norm import rms_norm
from mobilellm_jax.model.precision import compute_dtype
from mobilellm_jax.model.rope import rotate, rotation
from mobilellm_jax.model.transformer import Params, head_matrix


@struct.dataclass
class BlockWeights:
    """One block. M is a key head's queries, its key and its value: G + 2 rows of H."""

    attention_norm_D: Float[Array, "D"]
    input_DKMH: Float[Array, "D K M H"]
    output_QD: Float[Array, "Q D"]  # Q = N * H
    feed_forward_norm_D: Float[Array, "D"]
    wide_DCF: Float[Array, "D C F"]  # gate and up, or up alone
    down_FD: Float[Array, "F D"]


@struct.dataclass
class DecodingWeights:
    """A model's parameters for `decode`, matrices in the compute dtype, norms in float32."""

    table_VD: Float[Array, "V D"]
    blocks: tuple[BlockWeights, ...]  # unique ones; shared weights are there once
    final_norm_D: Float[Array, "D"]
    head_DV: Float[Array, "D V"]


def decoding_weights(params: Params, config: ModelConfig) -> DecodingWeights:
    """Lays the parameters out for `decode`; on a mesh every array stays divided as it was."""
    dtype = compute_dtype(config)
    return DecodingWeights(
        table_VD=params["embedding"]["table"].astype(dtype),
        blocks=tuple(
            _block(params["blocks"], np.int32(u), config) for u in range(config.num_blocks)
        ),
        final_norm_D=params["final_norm"]["scale"],
        head_DV=_head(params, config),
    )


@functools.partial(jax.jit, static_argnames="config")
def _head(params: Params, config: ModelConfig) -> Float[Array, "D V"]:
    return head_matrix(params, config).T.astype(compute_dtype(config))


@functools.partial(jax.jit, static_argnames="config")
def _block(blocks: Params, u: Int[Array, ""], config: ModelConfig) -> BlockWeights:
    """Returns block `u` of the stack; a program for one, since one for all compiles for seconds.

    What is joined is joined along an axis of its own, never along one that a mesh divides.
    """
    dtype = compute_dtype(config)
    block = jax.tree.map(lambda stacked: stacked[u], blocks)
    attention, feed_forward = block["attention"], block["feed_forward"]
    query_DNH, key_DKH, value_DKH = (attention[name] for name in ("query", "key", "value"))
    width, kv_heads, head_dim = key_DKH.shape
    query_DKGH = query_DNH.reshape(width, kv_heads, -1, head_dim)
    input_DKMH = [query_DKGH, key_DKH[:, :, None], value_DKH[:, :, None]]
    wide = ("gate", "up") if config.activation == "swiglu" else ("up",)
    return BlockWeights(
        attention_norm_D=block["attention_norm"]["scale"],
        input_DKMH=jnp.concatenate(input_DKMH, axis=2).astype(dtype),
        output_QD=attention["output"].reshape(-1, width).astype(dtype),
        feed_forward_norm_D=block["feed_forward_norm"]["scale"],
        wide_DCF=jnp.stack([feed_forward[name] for name in wide], axis=1).astype(dtype),
        down_FD=feed_forward["down"].astype(dtype),
    )


def decode(
    config: ModelConfig, weights: DecodingWeights, token_B: Int[Array, "B"], cache: AlignedCache
) -> tuple[Float[Array, "B V"], AlignedCache]:
    """Reads a token per row; returns the float32 logits of the next, and the longer cache."""
    batch, head_dim = token_B.shape[0], config.head_dim
    positions_B1 = (cache.length - cache.start_B)[:, None]
    turn = rotation(positions_B1, head_dim, config.rope_theta)
    keys_1S = jnp.arange(cache.k_WSH[0].shape[1], dtype=jnp.int32)[None, :]
    mask_BS = (keys_1S >= cache.start_B[:, None]) & (keys_1S <= cache.length)
    mask_W1S = jnp.repeat(mask_BS, config.num_kv_heads, axis=0)[:, None, :]
    k_WSH, v_WSH = list(cache.k_WSH), list(cache.v_WSH)

    x_BD = weights.table_VD[token_B]
    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    for slot, u in enumerate(order):
        block = weights.blocks[u]
        h_BD = rms_norm(x_BD, block.attention_norm_D, config.norm_eps)
        h_BKMH = _product("BD,DKMH->BKMH", h_BD, block.input_DKMH)
        turned_B1NH = rotate(h_BKMH[:, :, :-1].reshape(batch, 1, -1, head_dim), turn)
        qk_WGH = turned_B1NH.reshape(batch * config.num_kv_heads, -1, head_dim)
        v_W1H = h_BKMH[:, :, -1:].reshape(-1, 1, head_dim)
        k_WSH[slot] = _written(k_WSH[slot], qk_WGH[:, -1:], cache.length)
        v_WSH[slot] = _written(v_WSH[slot], v_W1H, cache.length)
        out_WGH = _attend(qk_WGH[:, :-1], k_WSH[slot], v_WSH[slot], mask_W1S)
        out_BQ = out_WGH.reshape(batch, -1)
        x_BD = x_BD + _product("BQ,QD->BD", out_BQ, block.output_QD)

        h_BD = rms_norm(x_BD, block.feed_forward_norm_D, config.norm_eps)
        wide_BCF = _product("BD,DCF->BCF", h_BD, block.wide_DCF)
        if config.activation == "swiglu":
            h_BF = jax.nn.silu(wide_BCF[:, 0]) * wide_BCF[:, 1]
        elif config.activation == "relu":
            h_BF = jax.nn.relu(wide_BCF[:, 0])
        else:
            h_BF = jax.nn.gelu(wide_BCF[:, 0], approximate=False)
        x_BD = x_BD + _product("BF,FD->BD", h_BF, block.down_FD)

    x_BD = rms_norm(x_BD, weights.final_norm_D, config.norm_eps)
    logits_BV = jnp.einsum("BD,DV->BV", x_BD, weights.head_DV, preferred_element_type=jnp.float32)
    longer = dataclasses.replace(
        cache, k_WSH=tuple(k_WSH), v_WSH=tuple(v_WSH), length=cache.length + 1
    )
    return logits_BV, longer


def _product(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """The einsum, asked for in float32: XLA's CPU backend has none of bfloat16 to bfloat16."""
    return jnp.einsum(spec, x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


def _attend(
    q_WGH: Float[Array, "W G H"],
    k_WSH: Float[Array, "W S H"],
    v_WSH: Float[Array, "W S H"],
    mask_W1S: Bool[Array, "W 1 S"],
) -> Float[Array, "W G H"]:
    """`attention.attend` for one query per head."""
    wide = jnp.float32
    scores_WGS = jnp.einsum("WGH,WSH->WGS", q_WGH, k_WSH, preferred_element_type=wide)
    scores_WGS = jnp.where(mask_W1S, scores_WGS, np.finfo(np.float32).min)
    highest_WG1 = jnp.max(scores_WGS, axis=-1, keepdims=True)
    weights_WGS = jnp.exp((scores_WGS - highest_WG1) * q_WGH.shape[-1] ** -0.5)
    total_WG1 = jnp.sum(weights_WGS, axis=-1, keepdims=True)
    out_WGH = jnp.einsum(
        "WGS,WSH->WGH", weights_WGS.astype(v_WSH.dtype), v_WSH, preferred_element_type=wide
    )
    return (out_WGH / total_WG1).astype(q_WGH.dtype)


def _written(
    slot_WSH: Float[Array, "W S H"], new_W1H: Float[Array, "W 1 H"], at: Int[Array, ""]
) -> Float[Array, "W S H"]:
    return jax.lax.dynamic_update_slice_in_dim(slot_WSH, new_W1H, at, axis=1)
