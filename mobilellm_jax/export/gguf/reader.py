"""Reads a GGUF file of llama.cpp's architecture `llama`: the model, its tokenizer and template.

Quantized weights become the float32 numbers with which llama.cpp computes. The rows of the query
and key projections go back into the order that `writer.py` describes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mobilellm_jax.config import ConfigError, ModelConfig
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.gguf.container import Container
from mobilellm_jax.export.gguf.header import ROPE_DIVISORS, rope_divisors
from mobilellm_jax.export.gguf.tokenizer_files import write_tokenizer
from mobilellm_jax.export.huggingface.directory import Imported, check_vocabulary
from mobilellm_jax.export.huggingface.layout import (
    EMBEDDING,
    HEAD,
    check_shapes,
    our_params,
    their_shapes,
)
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.strict_json import shown

_ARCHITECTURE = "llama"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LLAMA3_ORIGINAL_LEN = 8192  # All published models with this scaling have this length.


def read_gguf(file: Path, folder: Path) -> Imported:
    """Reads a model; writes the files of its tokenizer into `folder` and opens them there.

    Raises:
      MissingFileError: if there is no such file.
      UserError: if the file is damaged, or this package would compute anything differently.
    """
    container = Container(file)
    try:
        config = _config(container)
    except strict_json.JsonError as error:
        raise UserError(f"{file}: {error}") from error
    if config.num_blocks > len(container.tensors):
        raise UserError(
            f"{file} has {len(container.tensors)} tensors for {_ARCHITECTURE}.block_count="
            f"{config.num_blocks}; fetch the file again."
        )
    names = _names(config)
    check_shapes(
        {names[theirs]: shape for theirs, shape in their_shapes(config, config.num_blocks).items()},
        {n: t.shape for n, t in container.tensors.items() if n != ROPE_DIVISORS},
        str(file),
    )

    def read(theirs: str) -> np.ndarray:
        array = container.read(names[theirs])
        turned = theirs.endswith(("q_proj.weight", "k_proj.weight"))
        return _halves(array, config.head_dim) if turned else array

    params = our_params(config, read, file)
    write_tokenizer(container, folder, config.max_seq_len)
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        raise UserError(f"{file}: its tokenizer cannot be rebuilt. {error}") from error
    check_vocabulary(tokenizer, config, file)
    kinds = {t.kind.name for t in container.tensors.values() if len(t.shape) > 1}
    kind = kinds.pop() if len(kinds) == 1 else "F32"
    return Imported(config, params, tokenizer, _DTYPES.get(kind, "float32"))


def _names(config: ModelConfig) -> dict[str, str]:
    """Maps Hugging Face's name of each tensor to its name in a GGUF file."""
    layers = config.num_blocks
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    return {
        theirs: f"{known.get_name(theirs.removesuffix('.weight'))}.weight"
        for theirs in their_shapes(config, layers)
    }


def _halves(array_OD: np.ndarray, head_dim: int) -> np.ndarray:
    """Places the first channels of a head's pairs before the second ones."""
    inputs = array_OD.shape[1]
    pairs = array_OD.reshape(-1, head_dim // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(-1, inputs)


def _config(container: Container) -> ModelConfig:
    values, file = container.metadata, container.file
    found = strict_json.get(values, "general.architecture", str, "")
    if found != _ARCHITECTURE:
        raise UserError(
            f"{file}: general.architecture={shown(found)} must be {_ARCHITECTURE}; other "
            "architectures compute something else."
        )
    embedding = container.tensors.get(_plain_name(EMBEDDING))
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{file} has no {_plain_name(EMBEDDING)}, so it holds no model.")
    model = {
        key.removeprefix(f"{_ARCHITECTURE}."): value
        for key, value in values.items()
        if key.startswith(f"{_ARCHITECTURE}.")
    }
    heads = strict_json.get(model, "attention.head_count", int)
    width = strict_json.get(model, "embedding_length", int)
    head_dim = strict_json.get(model, "attention.key_length", int, width // max(1, heads))
    if problems := [*_unsupported(values, model, head_dim)]:
        raise UserError(
            "\n".join([f"{file} describes a model that this package does not have:", *problems])
        )
    try:
        config = ModelConfig(
            vocab_size=embedding.shape[0],
            embed_dim=width,
            num_blocks=strict_json.get(model, "block_count", int),
            num_heads=heads,
            num_kv_heads=strict_json.get(model, "attention.head_count_kv", int, heads),
            head_dim=head_dim,
            ffn_dim=strict_json.get(model, "feed_forward_length", int),
            tie_embeddings=_plain_name(HEAD) not in container.tensors,
            max_seq_len=strict_json.get(model, "context_length", int),
            rope_theta=strict_json.get(model, "rope.freq_base", float, 10_000.0),
            norm_eps=strict_json.get(model, "attention.layer_norm_rms_epsilon", float),
            **_linear(model),
        )
        return _with_divisors(container, config)
    except ConfigError as error:
        raise UserError(
            f"{file} describes a model that this package does not have:\n{error}"
        ) from error


def _plain_name(theirs: str) -> str:
    return {EMBEDDING: "token_embd.weight", HEAD: "output.weight"}[theirs]


def _unsupported(
    values: Mapping[str, Any], model: Mapping[str, Any], head_dim: int
) -> Iterator[str]:
    if strict_json.get(values, "split.count", int, 0) > 1:
        yield "It is one of several parts; join them with `llama-gguf-split --merge`."
    if strict_json.get(model, "expert_count", int, 0):
        yield f"{_ARCHITECTURE}.expert_count={model['expert_count']} must be 0."
    for key in ("attention.value_length", "rope.dimension_count"):
        if strict_json.get(model, key, int, head_dim) != head_dim:
            yield f"{_ARCHITECTURE}.{key}={model[key]} must be {head_dim}, the width of a head."
    scaling = strict_json.get(model, "rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        yield f"RoPE scaling {shown(scaling)} is not supported, only none, linear or llama3."
    longest = strict_json.get(model, "context_length", int)
    window = strict_json.get(model, "attention.sliding_window", int, 0)
    if 0 < window < longest:
        yield f"Attention over a window of {window} tokens is not supported."


def _linear(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of linear RoPE scaling, or {}; `scale_linear` is its older key."""
    factor = strict_json.get(
        model, "rope.scaling.factor", float, strict_json.get(model, "rope.scale_linear", float, 1.0)
    )
    linear = strict_json.get(model, "rope.scaling.type", str, "linear") == "linear"
    if not linear or factor in (0.0, 1.0):
        return {}
    return {"rope_scaling": "linear", "rope_factor": factor}


def _with_divisors(container: Container, config: ModelConfig) -> ModelConfig:
    """Returns the config with the llama3 scaling whose divisors the file has.

    The file does not name the numbers of the scaling. The largest divisor is the factor. The others
    have the same values in all published models.
    """
    if ROPE_DIVISORS not in container.tensors:
        return config
    found_P = container.read(ROPE_DIVISORS)
    if np.array_equal(found_P, np.ones(config.head_dim // 2)):
        return config
    key = f"{_ARCHITECTURE}.rope.scaling.original_context_length"
    stated = strict_json.get(container.metadata, key, int, _LLAMA3_ORIGINAL_LEN)
    if np.isfinite(found_P).all() and found_P.min(initial=1.0) > 0:
        for original in (stated, _LLAMA3_ORIGINAL_LEN):
            scaled = dataclasses.replace(
                config,
                rope_scaling="llama3",
                rope_factor=float(f"{found_P.max():.6g}"),
                rope_original_len=original,
            )
            expected_P = rope_divisors(scaled)
            if expected_P.shape == found_P.shape and np.allclose(expected_P, found_P, rtol=1e-4):
                return scaled
    raise UserError(
        f"{container.file}: its {ROPE_DIVISORS} is not the llama3 scaling with the low and high "
        "factors 1 and 4, the only one that can be read."
    )
