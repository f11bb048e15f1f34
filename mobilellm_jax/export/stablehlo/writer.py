"""Writes a model as two StableHLO functions, which take the weights as an argument.

`jax.export` makes the functions. `model.prefill.stablehlo` reads a sequence of 1 to max_seq_len
tokens and fills a cache. `model.stablehlo` reads one more token with this cache. Both run on CPUs,
NVIDIA GPUs and TPUs. `model.safetensors` holds the weights by name, in the shapes that decoding
needs (`model/decoding.py`). Shared blocks and tied embeddings are stored once. A program that runs
the functions needs jax, flatbuffers and safetensors, but not this package.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.export.stablehlo.runtime import DECODE, HASHES, PREFILL, WEIGHTS
from mobilellm_jax.model.attention import attend_within
from mobilellm_jax.model.cache import AlignedCache
from mobilellm_jax.model.decoding import (
    DecodingWeights,
    apply_unrolled,
    decode,
    decoding_weights,
)
from mobilellm_jax.model.on_device import compute_dtype
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.softmax import AttentionProducts
from mobilellm_jax.storage.rundir import write_whole

PLATFORMS = ("cpu", "cuda", "tpu")

Named = dict[str, jax.Array]
Cache = dict[str, Any]
"""The number `length`, and the lists `keys` and `values` with an array per block application."""


def write(source: OpenedModel, folder: Path, precision: str) -> int:
    """Writes functions and weights in `precision`; returns how many blocks they contain."""
    dtype: Any = precision
    config = dataclasses.replace(source.config, compute_dtype=dtype, attention="xla")
    params = jax.device_put(dict(source.params))
    weights = _named(decoding_weights(params, config), config)
    functions = {PREFILL: _prefill(config, weights), DECODE: _decode(config, weights)}
    hashes = []
    for file, function in functions.items():
        content = bytes(function.serialize())
        write_whole(folder / file, content)
        hashes.append(hashlib.sha256(content).hexdigest())
    # With the hashes, a reader can check that the three files come from one export before jax
    # parses them. One metadata entry holds both hashes, because safetensors does not keep the order
    # of entries.
    tensors = {name: np.asarray(array) for name, array in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={HASHES: " ".join(hashes)})
    return config.num_blocks


def _named(weights: DecodingWeights, config: ModelConfig) -> Named:
    tree: dict[str, Any] = {"embedding": weights.table_VD, "final_norm": weights.final_norm_D}
    if not config.tie_embeddings:
        tree["head"] = weights.head_DV
    tree |= {f"block_{u}": block for u, block in enumerate(weights.blocks)}
    named: Named = traverse_util.flatten_dict(tree, sep=".")  # type: ignore[no-untyped-call]  # flax
    return named


def _from_names(named: Named, config: ModelConfig) -> DecodingWeights:
    tree = traverse_util.unflatten_dict(named, sep=".")  # type: ignore[no-untyped-call]  # flax
    return DecodingWeights(
        table_VD=tree["embedding"],
        blocks=tuple(tree[f"block_{u}"] for u in range(config.num_blocks)),
        final_norm_D=tree["final_norm"],
        head_DV=tree["embedding"].T if config.tie_embeddings else tree["head"],
    )


def _decode(config: ModelConfig, weights: Named) -> export.Exported:
    def step(named: Named, token_B: Int[Array, "B"], cache: Cache) -> tuple[jax.Array, Cache]:
        aligned = AlignedCache(
            k_WSH=tuple(cache["keys"]),
            v_WSH=tuple(cache["values"]),
            start_B=jnp.zeros(1, jnp.int32),
            length=cache["length"],
        )
        logits_BV, longer = decode(config, _from_names(named, config), token_B, aligned)
        return logits_BV, {
            "keys": list(longer.k_WSH),
            "values": list(longer.v_WSH),
            "length": longer.length,
        }

    shape = (config.num_kv_heads, config.max_seq_len, config.head_dim)
    slot = jax.ShapeDtypeStruct(shape, compute_dtype(config))
    slots = [slot] * config.applied_depth
    number = jax.ShapeDtypeStruct((), jnp.int32)
    token_B = jax.ShapeDtypeStruct((1,), jnp.int32)
    cache = {"keys": slots, "values": slots, "length": number}
    return _exported(step, weights, token_B, cache)


def _prefill(config: ModelConfig, weights: Named) -> export.Exported:
    slot_shape = (config.num_kv_heads, config.max_seq_len, config.head_dim)

    def slot_of(x_BTKH: Float[Array, "B T K H"]) -> Float[Array, "K S H"]:
        empty_KSH = jnp.zeros(slot_shape, compute_dtype(config))
        new_KTH = x_BTKH[0].swapaxes(0, 1)
        return jax.lax.dynamic_update_slice_in_dim(empty_KSH, new_KTH, 0, axis=1)

    def read(
        named: Named, tokens_BT: Int[Array, "B T"], count: Int[Array, ""]
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Reads a sequence from its first token; returns the logits of all tokens and the cache.

        The tokens after the first `count` are padding. Decoding overwrites their keys and values.
        """
        positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        mask_BTS = positions_BT[:, None, :] <= positions_BT[:, :, None]
        attend = attend_within(config, None, mask_BTS)

        def attend_and_keep(
            q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, products: AttentionProducts
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            out_BTNH, _ = attend(q_BTNH, k_BTKH, v_BTKH, products)
            return out_BTNH, (slot_of(k_BTKH), slot_of(v_BTKH))

        decoding = _from_names(named, config)
        logits_BTV, slots = apply_unrolled(
            config, decoding, tokens_BT, positions_BT, lambda slot: attend_and_keep
        )
        keys, values = ([pair[i] for pair in slots] for i in (0, 1))
        return logits_BTV, {"keys": keys, "values": values, "length": count}

    [length] = export.symbolic_shape("T", constraints=[f"T <= {config.max_seq_len}"])
    tokens_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return _exported(read, weights, tokens_BT, jax.ShapeDtypeStruct((), jnp.int32))


def _exported(function: Callable[..., Any], weights: Named, *arguments: Any) -> export.Exported:
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    return export.export(jax.jit(function), platforms=PLATFORMS)(shapes, *arguments)
