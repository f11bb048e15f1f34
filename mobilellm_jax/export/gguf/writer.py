"""Writes a model and its tokenizer as one GGUF file for llama.cpp, tensor by tensor.

The file contains every applied layer, because tensors must follow each other without gaps and two
names cannot share bytes. Norms stay in float32. llama.cpp rotates neighbouring channels, and our
model rotates halves, so the rows of the query and key projections are reordered.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from flax import traverse_util
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.gguf.tokenizer import Vocabulary, check_in_llama_cpp, vocabulary_of
from mobilellm_jax.export.source import Source, check_groups
from mobilellm_jax.model.layer_sharing import application_order

ARCHITECTURE = "llama"
FILE = "model.gguf"

_Type = gguf.GGMLQuantizationType
_FileType = gguf.LlamaFileType
# For each precision: the type of the matrices, and llama.cpp's name for the file type.
_PRECISIONS: dict[str, tuple[Any, Any]] = {
    "float32": (_Type.F32, _FileType.ALL_F32),
    "float16": (_Type.F16, _FileType.MOSTLY_F16),
    "bfloat16": (_Type.BF16, _FileType.MOSTLY_BF16),
    "q8_0": (_Type.Q8_0, _FileType.MOSTLY_Q8_0),
    "q5_1": (_Type.Q5_1, _FileType.MOSTLY_Q5_1),
    "q5_0": (_Type.Q5_0, _FileType.MOSTLY_Q5_0),
    "q4_1": (_Type.Q4_1, _FileType.MOSTLY_Q4_1),
    "q4_0": (_Type.Q4_0, _FileType.MOSTLY_Q4_0),
}
_OF_32_BITS = (_Type.F32, _Type.BF16)  # bfloat16 has the exponent range of float32
_LARGEST_HALF = 65504.0  # the scales of quantized weights are float16 too

_BLOCK = {
    "attn_norm": "attention_norm/scale",
    "attn_q": "attention/query",
    "attn_k": "attention/key",
    "attn_v": "attention/value",
    "attn_output": "attention/output",
    "ffn_norm": "feed_forward_norm/scale",
    "ffn_gate": "feed_forward/gate",
    "ffn_up": "feed_forward/up",
    "ffn_down": "feed_forward/down",
}


def write(source: Source, folder: Path, precision: str) -> int:
    """Writes `model.gguf` into `folder`; returns the number of stored layers.

    Raises:
      UserError: if llama.cpp's `llama` architecture, the precision or llama.cpp's tokenizers cannot
        express the model.
    """
    config = source.config
    quantized, file_type = _PRECISIONS[precision]
    _check(config, precision, quantized)
    vocabulary = vocabulary_of(source.tokenizer, config.vocab_size)

    with contextlib.closing(gguf.GGUFWriter(folder / FILE, ARCHITECTURE)) as opened:
        writer: Any = opened
        _describe(writer, config, vocabulary)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, array in _tensors(config, source.params):
            kind = _kind(array, quantized)
            size = math.prod(gguf.quant_shape_to_byte_shape(array.shape, kind))
            writer.add_tensor_info(name, array.shape, array.dtype, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, array in _tensors(config, source.params):
            converted = _converted(name, array, _kind(array, quantized), precision)
            writer.write_tensor_data(converted)
    check_in_llama_cpp(folder / FILE, source.tokenizer)
    return config.applied_depth


def _check(config: ModelConfig, precision: str, quantized: Any) -> None:
    if config.activation != "swiglu":
        raise UserError(
            f"model.activation={config.activation} has two matrices in the feed-forward, and "
            f"GGUF's {ARCHITECTURE} architecture always three (swiglu). Use --format=mobilellm, or "
            "another format for devices."
        )
    block, _ = gguf.GGML_QUANT_SIZES[quantized]
    check_groups(config, block, precision, "--dtype=float16")


def _describe(writer: Any, config: ModelConfig, vocabulary: Vocabulary) -> None:
    writer.add_type("model")
    writer.add_name("MobileLLM")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.applied_depth)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    # Without these keys, readers use embedding_length / head_count.
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)

    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([text.encode() for text in vocabulary.tokens])
    writer.add_token_types(vocabulary.types)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges([merge.encode() for merge in vocabulary.merges])
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    if vocabulary.unknown_id is not None:
        writer.add_unk_token_id(vocabulary.unknown_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_prefix)


def _tensors(
    config: ModelConfig, params: Mapping[str, Any]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yields the tensors by llama.cpp's names, with outputs first; most tensors are views."""
    flat = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in traverse_util.flatten_dict(params, sep="/").items()  # type: ignore[no-untyped-call]  # flax
    }
    yield "token_embd.weight", flat["embedding/table"]
    yield "output_norm.weight", flat["final_norm/scale"]
    if not config.tie_embeddings:
        yield "output.weight", flat["head/kernel"].T
    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    for layer, block in enumerate(order):
        for name, path in _BLOCK.items():
            array = flat[f"blocks/{path}"][block]
            if name in ("attn_q", "attn_k"):
                array = _neighbours(array)
            if name == "attn_output":  # its inputs are heads and channels
                array = array.reshape(-1, config.embed_dim)
            elif array.ndim > 1:
                array = array.reshape(array.shape[0], -1)
            yield f"blk.{layer}.{name}.weight", array.T


def _neighbours(array_DNH: NDArray[np.float32]) -> NDArray[np.float32]:
    """Places the two channels of each head that rotate together side by side."""
    *outer, head_dim = array_DNH.shape
    return array_DNH.reshape(*outer, 2, head_dim // 2).swapaxes(-1, -2).reshape(array_DNH.shape)


def _kind(array: NDArray[np.float32], quantized: Any) -> Any:
    return _Type.F32 if array.ndim == 1 else quantized


def _converted(name: str, array: NDArray[np.float32], kind: Any, precision: str) -> NDArray[Any]:
    largest = float(np.abs(array).max())
    if not largest <= (np.inf if kind in _OF_32_BITS else _LARGEST_HALF) or not np.isfinite(
        largest
    ):
        raise UserError(
            f"{name} holds values up to {largest:g}, which {precision} does not express"
            + ("; use --dtype=bfloat16 or float32." if np.isfinite(largest) else ".")
        )
    converted: NDArray[Any] = gguf.quantize(np.ascontiguousarray(array), kind)
    return converted
