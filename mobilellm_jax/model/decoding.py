"""Decoding: the model reads one more token for every row of a batch.

`decode` computes the same function as `Transformer`, with the same `Block`. A test compares the two
at every position and for every sharing order. Only the layout differs, because decoding is bound by
the time to read the weights, and XLA on a CPU must not copy them:

- Each block's parameters are separate arrays. A scan would copy them out of the stack at every
  token.
- Matrices with the same input are joined into one product, and the output matrix of attention has
  two axes. XLA copied a matrix with three axes at every token, because it sums over two of them. At
  125M and batch 1 on two cores, this alone made a token 19% slower.
- The output matrix is stored transposed, in the order in which the product reads it.
- The layers are unrolled. Each layer has its own slot in the cache (`cache.AlignedCache`).

In jaxlib 0.10, XLA's CPU backend copies the slices of a scan inside a `while_loop`. Once a later
version of jaxlib does not copy the slices, use the stacked parameters here.
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

    Quantized matrices stay quantized.
    """

    table_VD: Kernel
    blocks: tuple[Params, ...]  # the unique blocks; shared weights are stored once
    final_norm_D: Float[Array, "D"]
    head_DV: Kernel


def in_compute_dtype(params: Params, config: ModelConfig) -> Params:
    """Converts every matrix to the compute dtype once, instead of at every use.

    An array that has the dtype already is not copied. Norm scales stay float32, because the model
    multiplies them in float32.
    """
    dtype = compute_dtype(config)

    def convert(path: tuple[jax.tree_util.DictKey, ...], leaf: Kernel) -> Kernel:
        return leaf if path[-1].key == "scale" else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(  # type: ignore[no-any-return]  # untyped
        convert, params, is_leaf=lambda node: isinstance(node, SpecialKernel)
    )


def decoding_weights(params: Params, config: ModelConfig) -> DecodingWeights:
    """Lays the parameters out for `decode`; on a mesh every array stays divided as it was."""
    params = in_compute_dtype(params, config)
    return DecodingWeights(
        table_VD=params["embedding"]["table"],
        blocks=tuple(_block(params["blocks"], np.int32(u)) for u in range(config.num_blocks)),
        final_norm_D=params["final_norm"]["scale"],
        head_DV=_transposed(head_matrix(params, config)),
    )


# One program serves every block. A program for all blocks would compile for seconds.
@jax.jit
def _block(blocks: Params, u: Int[Array, ""]) -> Params:
    return for_decoding(jax.tree.map(lambda stacked: stacked[u], blocks))


@jax.jit
def _transposed(matrix: Kernel) -> Kernel:
    return matrix.T


def decode(
    config: ModelConfig, weights: DecodingWeights, token_B: Int[Array, "B"], cache: AlignedCache
) -> tuple[Float[Array, "B V"], AlignedCache]:
    """Reads one token per row; returns float32 logits of the next token and the longer cache."""
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

    `attend_in_slot` returns the attention of the layer with this place in the application order.

    Returns:
      The float32 logits, and the second result of every layer's attention.
    """
    block = Block(config)
    turn = rotation(positions_BT, config.head_dim, config.rope_theta)
    x_BTD: Any = weights.table_VD[tokens_BT].astype(compute_dtype(config))
    memory = []
    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    for slot, u in enumerate(order):
        x_BTD, kept = block.apply({"params": weights.blocks[u]}, x_BTD, turn, attend_in_slot(slot))
        memory.append(kept)
    norm = {"params": {"scale": weights.final_norm_D}}
    x_BTD = RMSNorm(config.norm_eps).apply(norm, x_BTD)
    return scores("BTD,DV->BTV", x_BTD, weights.head_DV), memory
