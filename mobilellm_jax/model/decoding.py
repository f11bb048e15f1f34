"""Decoding: the model reads one more token for every row of a batch.

`decode` computes the same function as `Transformer`, with the same `Block`. A test compares both
functions at every position and for every sharing order. Only the layout of the weights differs.
Decoding is bound by the time to read the weights, so XLA on a CPU must not copy the weights:

- Each block's parameters are separate arrays. A scan over stacked parameters would copy the
  parameters at every token.
- Matrices with the same input are joined into one matrix, so one multiplication replaces several.
  The output matrix of attention has two axes. When it had three axes, two of them summed, XLA
  copied the matrix at every token. For the 125M model at batch 1 on two cores, this copy alone made
  a token 19% slower.
- The output matrix of the vocabulary (head) is stored in the order in which its multiplication
  reads it.
- The loop over the layers is unrolled. Each layer has its own slot in the cache
  (`cache.AlignedCache`).

In jaxlib 0.10, XLA's CPU backend copies the parameters of each block if a scan over blocks runs
inside a `while_loop`. When a later jaxlib makes no such copies, use the stacked parameters here.
`benchmarks/generate.py` measures the speed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.attention import Attend
from mobilellm_jax.model.block import Block, RMSNorm, for_decoding
from mobilellm_jax.model.cache import AlignedCache, attend_with_slot
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.on_device import compute_dtype
from mobilellm_jax.model.products import Kernel, SpecialKernel, scores
from mobilellm_jax.model.rope import rotation
from mobilellm_jax.model.transformer import Params, head_matrix


@struct.dataclass
class DecodingWeights:
    """A model's parameters for `decode`: matrices in the compute dtype, norms in float32.

    Quantized matrices remain quantized.
    """

    table_VD: Kernel
    blocks: tuple[Params, ...]  # The unique blocks; shared weights are stored once.
    final_norm_D: Float[Array, "D"]
    head_DV: Kernel


def in_compute_dtype(params: Params, config: ModelConfig) -> Params:
    """Converts every matrix to the compute dtype once, instead of at every use.

    The function does not copy an array that already has the compute dtype. Norm scales stay
    float32, because the model multiplies them in float32.
    """
    dtype = compute_dtype(config)

    def convert(path: tuple[jax.tree_util.DictKey, ...], leaf: Kernel) -> Kernel:
        return leaf if path[-1].key == "scale" else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(  # type: ignore[no-any-return]  # untyped
        convert, params, is_leaf=lambda node: isinstance(node, SpecialKernel)
    )


def decoding_weights(params: Params, config: ModelConfig) -> DecodingWeights:
    """Returns the parameters in the layout for `decode`; their sharding over the mesh stays."""
    params = in_compute_dtype(params, config)
    return DecodingWeights(
        table_VD=params["embedding"]["table"],
        blocks=tuple(_block(params["blocks"], np.int32(u)) for u in range(config.num_blocks)),
        final_norm_D=params["final_norm"]["scale"],
        head_DV=_transposed(head_matrix(params, config)),
    )


# One compiled program handles one block at a time. A program for all blocks at once would take
# seconds to compile.
@jax.jit
def _block(blocks: Params, u: Int[Array, ""]) -> Params:
    return for_decoding(jax.tree.map(lambda stacked: stacked[u], blocks))


@jax.jit
def _transposed(matrix: Kernel) -> Kernel:
    return matrix.T


def decode(
    config: ModelConfig, weights: DecodingWeights, token_B: Int[Array, "B"], cache: AlignedCache
) -> tuple[Float[Array, "B V"], AlignedCache]:
    """Reads one token per row; returns float32 logits of the next token and the extended cache."""
    keys_1S = jnp.arange(cache.capacity, dtype=jnp.int32)[None, :]
    mask_BS = (keys_1S >= cache.start_B[:, None]) & (keys_1S <= cache.length)
    mask_W11S = jnp.repeat(mask_BS, config.num_kv_heads, axis=0)[:, None, None, :]

    def attend_in_slot(slot: int) -> Attend:
        return attend_with_slot(cache.k_WSH[slot], cache.v_WSH[slot], cache.length, mask_W11S)

    positions_B1 = (cache.length - cache.start_B)[:, None]
    logits_B1V, slots = apply_unrolled(
        config, weights, token_B[:, None], positions_B1, attend_in_slot
    )
    longer = dataclasses.replace(
        cache,
        k_WSH=tuple(k_WSH for k_WSH, _ in slots),
        v_WSH=tuple(v_WSH for _, v_WSH in slots),
        length=cache.length + 1,
    )
    return logits_B1V[:, 0], longer


def apply_unrolled(
    config: ModelConfig,
    weights: DecodingWeights,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    attend_in_slot: Callable[[int], Attend],
) -> tuple[Float[Array, "B T V"], list[Any]]:
    """Applies the model layer after layer.

    `attend_in_slot(slot)` returns the `Attend` of layer number `slot` in the order of application.

    Returns:
      The float32 logits, and the second result of every layer's attention.
    """
    block = Block(config)
    turn = rotation(positions_BT, config)
    x_BTD: Any = weights.table_VD[tokens_BT].astype(compute_dtype(config))
    memory = []
    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    for slot, u in enumerate(order):
        x_BTD, kept = block.apply({"params": weights.blocks[u]}, x_BTD, turn, attend_in_slot(slot))
        memory.append(kept)
    norm = {"params": {"scale": weights.final_norm_D}}
    x_BTD = RMSNorm(config.norm_eps).apply(norm, x_BTD)
    return scores("BTD,DV->BTV", x_BTD, weights.head_DV), memory
