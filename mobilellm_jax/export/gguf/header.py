"""Writes the header of a GGUF file (everything before the weights), and checks such headers.

The header contains the shape of the model, its tokenizer, and an entry per tensor. llama.cpp aborts
the process if numbers in the header contradict each other. Before loading a file, the runtime
therefore writes the expected header from the manifest and the tokenizer's file, and refuses a file
with another header. The checksums in the manifest protect the weights.
"""

import contextlib
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.gguf.tokenizer import Vocabulary, vocabulary_of
from mobilellm_jax.export.huggingface.layout import their_shapes
from mobilellm_jax.export.runtime import ArtifactInfo, wrong_model
from mobilellm_jax.export.source import check_groups
from mobilellm_jax.model.rope import frequencies

ROPE_DIVISORS = "rope_freqs.weight"
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT  # Every tensor starts at a multiple of this.
_ARCHITECTURE = "llama"
_Type, _FileType = gguf.GGMLQuantizationType, gguf.LlamaFileType
# Maps each precision to the type of the matrices and llama.cpp's type of the whole file.
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


def stored_type(axes: int, precision: str) -> Any:
    """Returns the type of a tensor with `axes` axes; norms have one axis and stay in float32."""
    return _Type.F32 if axes == 1 else _PRECISIONS[precision][0]


def write_header(file: Path, config: ModelConfig, tokenizer: Tokenizer, precision: str) -> int:
    """Writes the header to `file`; returns the number of bytes that the weights will take."""
    if config.activation != "swiglu":
        raise UserError(
            f"model.activation={config.activation} has two matrices in the feed-forward, and "
            f"GGUF's {_ARCHITECTURE} architecture always three (swiglu). Use --format=mobilellm, "
            "or another format for devices."
        )
    block, _ = gguf.GGML_QUANT_SIZES[stored_type(2, precision)]
    check_groups(config, block, precision, "--dtype=float16")
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)
    with contextlib.closing(gguf.GGUFWriter(file, _ARCHITECTURE)) as opened:
        writer: Any = opened
        _describe_model(writer, config)
        _describe_tokenizer(writer, tokenizer, vocabulary)
        writer.add_file_type(_PRECISIONS[precision][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        weight_bytes = _list_tensors(writer, config, precision)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    with file.open("ab") as end:
        end.write(bytes(-end.tell() % ALIGNMENT))
    return weight_bytes


def rope_divisors(config: ModelConfig) -> np.ndarray:
    """Returns the numbers by which llama.cpp divides the frequency of every pair of channels."""
    plain = dataclasses.replace(config, rope_scaling="none", rope_factor=1.0)
    return np.asarray(frequencies(plain) / frequencies(config), np.float32)


def check_header(file: Path, info: ArtifactInfo) -> None:
    """Checks that `file` has the header and the size that our writer gives it."""
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder) / file.name
        tokenizer = load_tokenizer(file.parent, ours=True)
        weight_bytes = write_header(ours, info.model, tokenizer, info.precision)
        header = ours.read_bytes()
    with file.open("rb") as theirs:
        if theirs.read(len(header)) != header:
            raise wrong_model(file, info, ", because it begins with other bytes")
    size, whole = file.stat().st_size, len(header) + weight_bytes
    if size != whole:
        raise wrong_model(file, info, f", because it has {size:,} bytes instead of {whole:,}")


def _describe_model(writer: Any, config: ModelConfig) -> None:
    writer.add_type("model")
    writer.add_name("MobileLLM")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.applied_depth)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    # Without the two lengths below, readers use embedding_length / head_count.
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)
    if config.rope_scaling == "llama3":
        # llama.cpp reads the divisors from the tensor `ROPE_DIVISORS`, and not this length.
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_len)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _describe_tokenizer(writer: Any, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([text.encode() for text in vocabulary.tokens])
    writer.add_token_types(vocabulary.types)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges([merge.encode() for merge in vocabulary.merges])
    if tokenizer.has_bos:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.unknown_id is not None:
        writer.add_unk_token_id(tokenizer.unknown_id)
    writer.add_add_bos_token(bool(tokenizer.convention.before))
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_prefix)


def _list_tensors(writer: Any, config: ModelConfig, precision: str) -> int:
    """Writes an entry per tensor to the file's table; returns the size of all tensors in bytes."""
    layers = config.applied_depth
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    total = 0
    if config.rope_scaling == "llama3":
        size = rope_divisors(config).nbytes
        pairs = (config.head_dim // 2,)
        writer.add_tensor_info(ROPE_DIVISORS, pairs, "float32", size, raw_dtype=_Type.F32)
        total += size + -size % ALIGNMENT
    for theirs, shape in their_shapes(config, layers).items():
        kind = stored_type(len(shape), precision)
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        name = names.get_name(theirs.removesuffix(".weight"))
        writer.add_tensor_info(f"{name}.weight", shape, "float32", size, raw_dtype=kind)
        total += size + -size % ALIGNMENT
    return total
