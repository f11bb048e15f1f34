"""StableHLO: the model as two functions by `jax.export`, its weights as their arguments.

`model.prefill.stablehlo` reads a sequence of any length up to the longest, `model.stablehlo` a
token more by the cache; both run on CPU, NVIDIA GPU and TPU. `model.safetensors` holds the weights
by name, laid out for decoding (`model/decoding.py`), shared blocks and tied embeddings once.
Whoever runs them needs jax, flatbuffers and safetensors, and nothing of this package.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.export.source import Source
from mobilellm_jax.model.attention import attend
from mobilellm_jax.model.cache import AlignedCache
from mobilellm_jax.model.decoding import BlockWeights, DecodingWeights, decode, decoding_weights
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.norm import rms_norm
from mobilellm_jax.model.precision import compute_dtype
from mobilellm_jax.model.products import rows_of, scores
from mobilellm_jax.model.quantized import Kernel, QuantizedAttention
from mobilellm_jax.model.rope import rotate, rotation
from mobilellm_jax.storage.rundir import write_whole

PLATFORMS = ("cpu", "cuda", "tpu")
DECODE, PREFILL, WEIGHTS = "model.stablehlo", "model.prefill.stablehlo", "model.safetensors"

HASHES = "sha256 of prefill and decode"  # in the metadata of the weights

Named = dict[str, jax.Array]
Cache = dict[str, Any]
"""`length`, and `keys` and `values`: a list with an array per application of a block."""

# The fields of a block that are written, by name.
_FIELDS = {
    "attention_norm": "attention_norm_D",
    "input": "input_DKMH",
    "output": "output_QD",
    "feed_forward_norm": "feed_forward_norm_D",
    "wide": "wide_DCF",
    "down": "down_FD",
}


def write(source: Source, folder: Path, precision: str) -> int:
    """Writes both functions and the weights.

    Args:
      source: the model.
      folder: where to.
      precision: float32 or bfloat16, of weights, activations and cache.

    Returns:
      The number of blocks stored.
    """
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
    # With them a reader knows that the three files are of one export, before jax parses any. One
    # entry, since safetensors writes several in any order.
    tensors = {name: np.asarray(array) for name, array in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={HASHES: " ".join(hashes)})
    return config.num_blocks


def _named(weights: DecodingWeights, config: ModelConfig) -> Named:
    named: dict[str, Any] = {"embedding": weights.table_VD, "final_norm": weights.final_norm_D}
    if not config.tie_embeddings:
        named["head"] = weights.head_DV
    for u, block in enumerate(weights.blocks):
        for name, field in _FIELDS.items():
            named[f"block_{u}.{name}"] = getattr(block, field)
    return named


def _of_names(named: Named, config: ModelConfig) -> DecodingWeights:
    def block(u: int) -> BlockWeights:
        fields: dict[str, Any] = {f: named[f"block_{u}.{name}"] for name, f in _FIELDS.items()}
        return BlockWeights(**fields)

    return DecodingWeights(
        table_VD=named["embedding"],
        blocks=tuple(block(u) for u in range(config.num_blocks)),
        final_norm_D=named["final_norm"],
        head_DV=named["embedding"].T if config.tie_embeddings else named["head"],
        in_8_bits=QuantizedAttention(),
    )


def _decode(config: ModelConfig, weights: Named) -> export.Exported:
    def step(named: Named, token_B: Int[Array, "B"], cache: Cache) -> tuple[jax.Array, Cache]:
        aligned = AlignedCache(
            k_WSH=tuple(cache["keys"]),
            v_WSH=tuple(cache["values"]),
            start_B=jnp.zeros(1, jnp.int32),
            length=cache["length"],
        )
        logits_BV, longer = decode(config, _of_names(named, config), token_B, aligned)
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
    def read(
        named: Named, tokens_BT: Int[Array, "B T"], count: Int[Array, ""]
    ) -> tuple[jax.Array, Cache]:
        return _read(config, _of_names(named, config), tokens_BT, count)

    [length] = export.symbolic_shape("T", constraints=[f"T <= {config.max_seq_len}"])
    tokens_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return _exported(read, weights, tokens_BT, jax.ShapeDtypeStruct((), jnp.int32))


def _exported(function: Callable[..., Any], weights: Named, *arguments: Any) -> export.Exported:
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    return export.export(jax.jit(function), platforms=PLATFORMS)(shapes, *arguments)


def _read(
    config: ModelConfig,
    weights: DecodingWeights,
    tokens_BT: Int[Array, "B T"],
    count: Int[Array, ""],
) -> tuple[Float[Array, "B T V"], Cache]:
    """Reads one row from its start, of which `count` tokens count; returns logits and the cache.

    What follows those is padding: the next token overwrites it in the cache.
    """
    length, head_dim = tokens_BT.shape[1], config.head_dim
    positions_BT = jnp.arange(length, dtype=jnp.int32)[None]
    turn = rotation(positions_BT, head_dim, config.rope_theta)
    mask_BTS = positions_BT[:, None, :] <= positions_BT[:, :, None]
    empty_KSH = jnp.zeros(
        (config.num_kv_heads, config.max_seq_len, head_dim), compute_dtype(config)
    )

    def slot_of(x_BTKH: Float[Array, "B T K H"]) -> Float[Array, "K S H"]:
        new_KTH = x_BTKH[0].swapaxes(0, 1)
        return jax.lax.dynamic_update_slice_in_dim(empty_KSH, new_KTH, 0, axis=1)

    cache: Cache = {"keys": [], "values": [], "length": count}
    x_BTD = rows_of(weights.table_VD, tokens_BT).astype(compute_dtype(config))
    for u in application_order(config.num_blocks, config.num_repeats, config.sharing):
        block = weights.blocks[u]
        h_BTD = rms_norm(x_BTD, block.attention_norm_D, config.norm_eps)
        h_BTKMH = _product("BTD,DKMH->BTKMH", h_BTD, block.input_DKMH)
        q_BTNH = rotate(h_BTKMH[..., :-2, :].reshape(1, length, -1, head_dim), turn)
        k_BTKH, v_BTKH = rotate(h_BTKMH[..., -2, :], turn), h_BTKMH[..., -1, :]
        cache["keys"].append(slot_of(k_BTKH))
        cache["values"].append(slot_of(v_BTKH))
        out_BTQ = attend(q_BTNH, k_BTKH, v_BTKH, mask_BTS).reshape(1, length, -1)
        x_BTD = x_BTD + _product("BTQ,QD->BTD", out_BTQ, block.output_QD)

        h_BTD = rms_norm(x_BTD, block.feed_forward_norm_D, config.norm_eps)
        wide_BTCF = _product("BTD,DCF->BTCF", h_BTD, block.wide_DCF)
        if config.activation == "swiglu":
            h_BTF = jax.nn.silu(wide_BTCF[:, :, 0]) * wide_BTCF[:, :, 1]
        elif config.activation == "relu":
            h_BTF = jax.nn.relu(wide_BTCF[:, :, 0])
        else:
            h_BTF = jax.nn.gelu(wide_BTCF[:, :, 0], approximate=False)
        x_BTD = x_BTD + _product("BTF,FD->BTD", h_BTF, block.down_FD)
    x_BTD = rms_norm(x_BTD, weights.final_norm_D, config.norm_eps)
    return scores("BTD,DV->BTV", x_BTD, weights.head_DV), cache


def _product(spec: str, x: jax.Array, weight: Kernel) -> jax.Array:
    """The einsum with float32 sums, as in `decode`."""
    return scores(spec, x, weight).astype(x.dtype)
