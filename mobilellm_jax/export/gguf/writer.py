"""Writes a model and its tokenizer as one GGUF file for llama.cpp, tensor by tensor.

The file contains a shared block once per application, because llama.cpp has no shared layers and
two tensors of a GGUF file cannot share bytes. Norms stay in float32. RoPE rotates pairs of
channels: llama.cpp pairs adjacent channels, and our model pairs channel i of the first half with
channel i of the second half. The writer therefore reorders the rows of the query and key
projections.
"""

import importlib.util
from pathlib import Path

import gguf
import numpy as np

from mobilellm_jax.data.tokenizers.tokenizer import SPACE_MARK, Tokenizer, text_ids
from mobilellm_jax.export.gguf.header import ALIGNMENT, rope_divisors, stored_type, write_header
from mobilellm_jax.export.gguf.tokenizer import refused
from mobilellm_jax.export.huggingface.layout import their_tensors
from mobilellm_jax.export.huggingface.tokenizer_files import PROBES
from mobilellm_jax.export.source import DTYPES, narrowed
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.opened import OpenedModel

FILE = "model.gguf"


def write(source: OpenedModel, folder: Path, precision: str) -> int:
    """Writes `model.gguf` into `folder`; returns how many layers it contains."""
    config = source.config
    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    write_header(folder / FILE, config, source.tokenizer, precision)
    matrix_dtype = DTYPES.get(precision, DTYPES["float16"])  # If quantized, scales are float16.
    with (folder / FILE).open("ab") as file:
        if config.rope_scaling == "llama3":
            file.write(rope_divisors(config).tobytes())
            file.write(bytes(-file.tell() % ALIGNMENT))
        for name, array in their_tensors(config, source.params, order):
            kind = stored_type(array.ndim, precision)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                array = _neighbours(array, config.head_dim)
            narrowed(name, array, precision, matrix_dtype if array.ndim > 1 else array.dtype)
            file.write(gguf.quantize(np.ascontiguousarray(array, np.float32), kind).tobytes())
            file.write(bytes(-file.tell() % ALIGNMENT))
    _check_in_llama_cpp(folder / FILE, source.tokenizer)
    return config.applied_depth


def _neighbours(array_OD: np.ndarray, head_dim: int) -> np.ndarray:
    """Places the two channels of each pair side by side; RoPE rotates channels in pairs."""
    inputs = array_OD.shape[1]
    halves = array_OD.reshape(-1, 2, head_dim // 2, inputs)
    return halves.swapaxes(1, 2).reshape(-1, inputs)


def _check_in_llama_cpp(file: Path, tokenizer: Tokenizer) -> None:
    """Checks on many texts that llama.cpp gives the tokenizer's ids, if llama.cpp is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return
    from mobilellm_jax.export.gguf.runtime import LlamaCppVocabulary

    vocabulary = LlamaCppVocabulary(file)
    # A token that is part of a character decodes to U+FFFD, which is a valid text to compare.
    pieces = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
    for text in (*PROBES, *pieces):
        if SPACE_MARK in text:
            continue
        ids = text_ids(tokenizer, text)
        found = vocabulary.encode(text)
        if ids != found:
            problem = f"{text!r} is {ids} in it, but would be {found} in llama.cpp."
            raise refused(tokenizer, [problem])
