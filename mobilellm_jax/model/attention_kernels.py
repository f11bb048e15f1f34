"""Attention of whole sequences by accelerator kernels that never store the T x T scores.

`model.attention` names a kernel. `config.rules.ATTENTION` lists the limits of each kernel, and the
config refuses a combination that a kernel cannot compute. All kernels compute the same function as
`softmax.attend`, which decoding uses. Tests compare each kernel with `softmax.attend`.
"""

import functools
from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mobilellm_jax.model.softmax import SAVED, Keys, Queries

_SPLASH_BLOCK = 512

_Segments = Int[Array, "B T"] | None
_Kernel = Callable[[Queries, Keys, Keys, _Segments], Queries]


def self_attention(
    name: str, q_BTNH: Queries, k_BTKH: Keys, v_BTKH: Keys, segments_BT: _Segments
) -> Queries:
    """Returns causal softmax(q k^T / sqrt(H)) v within segments, computed by the kernel `name`.

    Under a mesh, each device runs the kernel on its own batch rows and heads, because the compiler
    cannot split the inside of a kernel.
    """
    kernel = _KERNELS[name]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    split = functools.partial(nn.logical_to_mesh_axes, rules=nn.get_logical_axis_rules())
    heads = split(("batch", None, "heads", None))
    kv_heads = split(("batch", None, "kv_heads", None))
    rows = None if segments_BT is None else split(("batch", None))
    local = jax.shard_map(
        kernel,
        in_specs=(heads, kv_heads, kv_heads, rows),
        out_specs=heads,
        check_vma=False,  # A Pallas call does not declare over which mesh axes its results vary.
    )
    return local(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def cudnn(q_BTNH: Queries, k_BTKH: Keys, v_BTKH: Keys, segments_BT: _Segments) -> Queries:
    """Calls NVIDIA's kernel through JAX. The kernel cannot combine a causal mask with segments."""
    assert segments_BT is None, "the config refuses document masks with cudnn"
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn"
    )


def tokamax(
    q_BTNH: Queries,
    k_BTKH: Keys,
    v_BTKH: Keys,
    segments_BT: _Segments,
    *,
    implementation: str = "mosaic_gpu",
) -> Queries:
    """Calls Tokamax's Hopper kernel with a mask that stores the first visible key of each query.

    Tokamax's private class `Mask` describes packed documents by one number per query instead of T
    booleans. The public `tokamax.dot_product_attention` takes dense masks only (0.0.12 and 0.0.17),
    so this function uses private names: https://github.com/openxla/tokamax. Use the public function
    as soon as it has an argument for segments, or for the first visible key of each query.
    """
    from tokamax._src.ops.attention import api, base

    k_start_B1T = None if segments_BT is None else segment_starts(segments_BT)[:, None, :]
    mask = base.Mask(is_causal=True, k_start=k_start_B1T)
    return cast(jax.Array, api.IMPLEMENTATIONS[implementation](q_BTNH, k_BTKH, v_BTKH, mask=mask))


def splash(
    q_BTNH: Queries,
    k_BTKH: Keys,
    v_BTKH: Keys,
    segments_BT: _Segments,
    *,
    interpret: bool = False,
) -> Queries:
    """Calls JAX's own TPU kernel, which skips blocks of scores above the diagonal.

    The kernel reads inputs whose minor axis (the last axis in memory) is the sequence. A minor axis
    of 64 head channels would fill only half of a tile of 128. XLA makes the projections write this
    layout directly. Compiled for v5e, a step of the 125M model takes 270 M cycles outside the
    kernel if the sequence is the minor axis, and 360 M cycles if the head channels are the minor
    axis.

    With `interpret`, the kernel runs on any device, but slowly.
    """
    # Only TPUs need this import, which takes half a second.
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    length, num_heads, head_dim = q_BTNH.shape[1:]
    # Larger blocks waste more work. At length 2048, blocks of 512 compute a quarter of the scores
    # that the causal mask discards, and blocks of 1024 compute half of them. MaxText's default is
    # 512 too.
    block = next(b for b in range(min(_SPLASH_BLOCK, length), 0, -128) if length % b == 0)
    minor = library.QKVLayout.SEQ_MINOR
    kernel = library.make_splash_mha(
        library.MultiHeadMask([library.CausalMask((length, length))] * num_heads),
        block_sizes=library.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
            q_layout=minor,
            k_layout=minor,
            v_layout=minor,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    # The kernel does not scale the scores by 1 / sqrt(H). This function scales the keys instead,
    # because there are fewer key heads than query heads. If head_dim is a power of four, the factor
    # is a power of two, and the scaling causes no rounding error.
    k_BTKH = (k_BTKH.astype(jnp.float32) * head_dim**-0.5).astype(k_BTKH.dtype)
    segments = None if segments_BT is None else library.SegmentIds(q=segments_BT, kv=segments_BT)
    heads_first = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    out_BNTH = jax.vmap(kernel)(*heads_first, segments)
    return cast(jax.Array, out_BNTH.swapaxes(1, 2))


_KERNELS: dict[str, _Kernel] = {"cudnn": cudnn, "splash": splash, "tokamax": tokamax}


def segment_starts(segments_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the position at which the segment of each token starts."""
    length = segments_BT.shape[1]
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    places_1T = jnp.arange(1, length, dtype=jnp.int32)[None, :]
    starts_BT = jnp.pad(jnp.where(changes_BT, places_1T, 0), ((0, 0), (1, 0)))
    return jax.lax.cummax(starts_BT, axis=1)
