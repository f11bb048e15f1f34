"""One token more for every row of a batch: the model as decoding needs it.

Reading weights is all that decoding takes time for, so they are laid out for it once. The stacked
parameters of the blocks, which a scan would copy out of the stack for every token, become arrays of
their own; products with the same input become one; the head lies as the product reads it. The
layers are unrolled, each with its own slot in the cache.

The same function as `Transformer`, which a test holds for every position and sharing order.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.cache import AlignedCache, Rows, as_floats
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.norm import rms_norm
from mobilellm_jax.model.parameters import ATTENTION_IN_8_BITS
from mobilellm_jax.model.precision import compute_dtype
from mobilellm_jax.model.products import narrowed, rows_of, scores
from mobilellm_jax.model.quantized import Kernel, QuantizedAttention, QuantizedRows, to_rows
from mobilellm_jax.model.quantized_attention import attend_in_8_bits
from mobilellm_jax.model.rope import rotate, rotation
from mobilellm_jax.model.transformer import Params, head_matrix


@struct.dataclass
class BlockWeights:
    """One block. M is a key head's queries, its key and its value: G + 2 rows of H.

    Quantized matrices are laid out in the same way, values and scales.
    """

    attention_norm_D: Float[Array, "D"]
    input_DKMH: Kernel
    output_QD: Kernel  # Q = N * H
    feed_forward_norm_D: Float[Array, "D"]
    wide_DCF: Kernel  # gate and up, or up alone
    down_FD: Kernel


@struct.dataclass
class DecodingWeights:
    """A model's parameters for `decode`, matrices in the compute dtype, norms in float32.

    Those that are quantized stay so.
    """

    table_VD: Kernel
    blocks: tuple[BlockWeights, ...]  # unique ones; shared weights are there once
    final_norm_D: Float[Array, "D"]
    head_DV: Kernel
    in_8_bits: QuantizedAttention


def decoding_weights(params: Params, config: ModelConfig) -> DecodingWeights:
    """Lays the parameters out for `decode`; on a mesh every array stays divided as it was."""
    dtype = compute_dtype(config)
    return DecodingWeights(
        table_VD=narrowed(params["embedding"]["table"], dtype),
        blocks=tuple(
            _block(params["blocks"], np.int32(u), config) for u in range(config.num_blocks)
        ),
        final_norm_D=params["final_norm"]["scale"],
        head_DV=_head(params, config),
        in_8_bits=in_8_bits(params),
    )


def in_8_bits(params: Params) -> QuantizedAttention:
    """Returns what `Attention` is told by the parameters."""
    said: QuantizedAttention | None = params["blocks"]["attention"].get(ATTENTION_IN_8_BITS)
    return said or QuantizedAttention()


@functools.partial(jax.jit, static_argnames="config")
def _head(params: Params, config: ModelConfig) -> Kernel:
    return narrowed(head_matrix(params, config).T, compute_dtype(config))


@functools.partial(jax.jit, static_argnames="config")
def _block(blocks: Params, u: Int[Array, ""], config: ModelConfig) -> BlockWeights:
    """Returns block `u` of the stack; a program for one, since one for all compiles for seconds.

    What is joined is joined along an axis of its own, never along one that a mesh divides.
    """
    dtype = compute_dtype(config)
    block = jax.tree.map(lambda stacked: stacked[u], blocks)
    attention, feed_forward = block["attention"], block["feed_forward"]
    wide = ("gate", "up") if config.activation == "swiglu" else ("up",)

    def laid_out(layout: Callable[..., jax.Array], *kernels: Kernel) -> Kernel:
        # A quantized kernel's scales have its axes, so that they are laid out as it is.
        joined: Kernel = jax.tree.map(layout, *kernels)
        return narrowed(joined, dtype)

    def with_same_input(
        query_DNH: jax.Array, key_DKH: jax.Array, value_DKH: jax.Array
    ) -> jax.Array:
        width, kv_heads, head_dim = key_DKH.shape
        query_DKGH = query_DNH.reshape(width, kv_heads, -1, head_dim)
        return jnp.concatenate([query_DKGH, key_DKH[:, :, None], value_DKH[:, :, None]], axis=2)

    return BlockWeights(
        attention_norm_D=block["attention_norm"]["scale"],
        input_DKMH=laid_out(
            with_same_input, attention["query"], attention["key"], attention["value"]
        ),
        output_QD=laid_out(lambda x: x.reshape(-1, x.shape[-1]), attention["output"]),
        feed_forward_norm_D=block["feed_forward_norm"]["scale"],
        wide_DCF=laid_out(
            lambda *parts: jnp.stack(parts, axis=1), *(feed_forward[name] for name in wide)
        ),
        down_FD=laid_out(lambda x: x, feed_forward["down"]),
    )


def decode(
    config: ModelConfig, weights: DecodingWeights, token_B: Int[Array, "B"], cache: AlignedCache
) -> tuple[Float[Array, "B V"], AlignedCache]:
    """Reads a token per row; returns the float32 logits of the next, and the longer cache."""
    batch, head_dim = token_B.shape[0], config.head_dim
    positions_B1 = (cache.length - cache.start_B)[:, None]
    turn = rotation(positions_B1, head_dim, config.rope_theta)
    keys_1S = jnp.arange(cache.capacity, dtype=jnp.int32)[None, :]
    mask_BS = (keys_1S >= cache.start_B[:, None]) & (keys_1S <= cache.length)
    mask_W1S = jnp.repeat(mask_BS, config.num_kv_heads, axis=0)[:, None, :]
    k_WSH, v_WSH = list(cache.k_WSH), list(cache.v_WSH)

    x_BD = rows_of(weights.table_VD, token_B).astype(compute_dtype(config))
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
        k_wide_WSH, v_wide_WSH = (as_floats(x[slot], h_BD.dtype) for x in (k_WSH, v_WSH))
        attend = _attend_in_8_bits if weights.in_8_bits.products else _attend
        out_WGH = attend(qk_WGH[:, :-1], k_wide_WSH, v_wide_WSH, mask_W1S)
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
    logits_BV = scores("BD,DV->BV", x_BD, weights.head_DV)
    longer = dataclasses.replace(
        cache, k_WSH=tuple(k_WSH), v_WSH=tuple(v_WSH), length=cache.length + 1
    )
    return logits_BV, longer


def _product(spec: str, x: jax.Array, weight: Kernel) -> jax.Array:
    """The einsum, asked for in float32: XLA's CPU backend has none of bfloat16 to bfloat16."""
    return scores(spec, x, weight).astype(x.dtype)


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


def _attend_in_8_bits(
    q_WGH: Float[Array, "W G H"],
    k_WSH: Float[Array, "W S H"],
    v_WSH: Float[Array, "W S H"],
    mask_W1S: Bool[Array, "W 1 S"],
) -> Float[Array, "W G H"]:
    """`attend_in_8_bits` for one query per head: W rows with one key head each."""
    out_W1GH = attend_in_8_bits(q_WGH[:, None], k_WSH[:, :, None], v_WSH[:, :, None], mask_W1S)
    return out_W1GH[:, 0]


def _written(slot_WSH: Rows, new_W1H: Float[Array, "W 1 H"], at: Int[Array, ""]) -> Rows:
    new = to_rows(new_W1H) if isinstance(slot_WSH, QuantizedRows) else new_W1H
    return jax.tree.map(  # type: ignore[no-any-return]  # untyped
        lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, at, axis=1), slot_WSH, new
    )
