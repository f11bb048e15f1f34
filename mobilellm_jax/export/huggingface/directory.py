"""Writes and reads Hugging Face directories.

There are two layouts. `hf` is a LlamaForCausalLM that contains a shared block once per application,
so every program that reads Llama models can run it. `mobilellm` contains every block once. Its
config.json has the keys `layer_sharing` and `share_embedding` of the paper's code, and the
directory includes our modelling file. `mobilellm` can also express models that LlamaForCausalLM
cannot.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.folder import GENERATION_CONFIG
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.export.huggingface.config import (
    MODELING_FILE,
    Layout,
    check_llama,
    from_config_json,
    ignores_head,
    to_config_json,
)
from mobilellm_jax.export.huggingface.layout import (
    EMBEDDING,
    HEAD,
    check_shapes,
    our_params,
    their_shapes,
    their_tensors,
)
from mobilellm_jax.export.huggingface.tokenizer_files import write_tokenizer_files
from mobilellm_jax.export.huggingface.torch_files import StoredTensor
from mobilellm_jax.export.huggingface.weight_files import open_tensors, spare_pickle, write_tensors
from mobilellm_jax.export.source import narrowed
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.storage import file_kind, strict_json
from mobilellm_jax.storage.rundir import (
    SENTENCEPIECE_MODEL,
    TOKENIZER_FILES,
    tokenizer_file,
    write_whole,
)

_log = logging.getLogger(__name__)
CONFIG = "config.json"
# Old versions of transformers stored these RoPE frequencies. The config determines them.
_DERIVED = "rotary_emb.inv_freq"


class Imported(NamedTuple):
    """The result of `read_huggingface`."""

    config: ModelConfig
    params: dict[str, Any]  # NumPy arrays in float32.
    tokenizer: Tokenizer
    dtype: str  # Dtype of the stored weights; an export in this dtype stores the same bits.


def write_llama(source: OpenedModel, folder: Path, precision: str) -> int:
    """Writes the layout `hf`; returns how many layers it contains."""
    config = source.config
    check_llama(config)
    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    return _write_files(source, folder, precision, "hf", order)


def write_mobilellm(source: OpenedModel, folder: Path, precision: str) -> int:
    """Writes the layout `mobilellm`; returns how many blocks it contains."""
    shutil.copyfile(Path(__file__).with_name(MODELING_FILE), folder / MODELING_FILE)
    blocks = range(source.config.num_blocks)
    return _write_files(source, folder, precision, "mobilellm", blocks)


def read_huggingface(directory: Path) -> Imported:
    """Reads a Llama model, a model of the paper's code, or the files of `write_mobilellm`.

    Raises:
      MissingFileError: if config.json, the weights or the tokenizer is missing.
      UserError: if `ModelConfig` cannot express the model, tensors or tokenizer do not fit it, or
        a weight is not finite.
    """
    values = _read_config_json(directory)
    config = from_config_json(values, directory / CONFIG)
    stored = open_tensors(directory)
    _drop_head(config, stored, directory, ignored=ignores_head(values))
    _check_tensors(config, stored, directory)
    dtypes = {tensor.dtype for tensor in stored.values()}
    return Imported(
        config=config,
        params=our_params(config, lambda name: stored[name].read(), directory),
        tokenizer=_open_tokenizer(directory, config),
        # Only float32 can store the values of several dtypes exactly.
        dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
    )


def read_model_config(directory: Path) -> ModelConfig:
    """Returns the model that config.json describes; raises as `read_huggingface` does."""
    return from_config_json(_read_config_json(directory), directory / CONFIG)


def _read_config_json(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    if not file_kind.is_there(file):
        raise MissingFileError(f"{directory} is not a Hugging Face directory: it has no {CONFIG}.")
    # The directory's Python code, which config.json may name (auto_map), is never run.
    values: dict[str, Any] = strict_json.as_type(strict_json.read(file), dict[str, Any], str(file))
    return values


def _write_files(
    source: OpenedModel, folder: Path, dtype: str, layout: Layout, blocks: Sequence[int]
) -> int:
    """Writes all files of a model whose layer i is block `blocks[i]`."""
    config, tokenizer = source.config, source.tokenizer
    ends = {
        "bos_token_id": tokenizer.bos_id if tokenizer.has_bos else None,
        "eos_token_id": _one_or_all(tokenizer.convention.end_ids),
    }
    # transformers 4 reads torch_dtype.
    dtypes = {"dtype": dtype, "torch_dtype": dtype}
    write_tokenizer_files(tokenizer, folder, config.max_seq_len)
    tensors = their_tensors(config, source.params, blocks)
    write_tensors(((name, narrowed(name, array, dtype)) for name, array in tensors), folder)
    _write_generation_config(folder / GENERATION_CONFIG, ends)
    _write_json(folder / CONFIG, to_config_json(config, len(blocks), layout) | ends | dtypes)
    return len(blocks)


def _one_or_all(ids: Sequence[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


def _drop_head(
    config: ModelConfig, stored: dict[str, StoredTensor], directory: Path, *, ignored: bool
) -> None:
    """Removes a head that a tied model does not need from `stored`.

    A head that differs from the embeddings is an error, unless the model's own code ignores it.
    """
    both = config.tie_embeddings and {HEAD, EMBEDDING} <= stored.keys()
    if not both or stored[HEAD].shape != stored[EMBEDDING].shape:
        return
    if not np.array_equal(stored[HEAD].read(), stored[EMBEDDING].read()):
        if not ignored:
            raise UserError(
                f"{directory}: config.json ties the embeddings, but {HEAD} and {EMBEDDING} "
                "differ; if the model is not tied, set tie_word_embeddings (and share_embedding) "
                "to false in config.json."
            )
        _log.warning(
            f"{directory}: {HEAD} differs from {EMBEDDING} and is left out, because config.json "
            "has share_embedding=true, and the paper's code then ignores this tensor."
        )
    del stored[HEAD]


def _check_tensors(config: ModelConfig, stored: dict[str, StoredTensor], directory: Path) -> None:
    """Checks that `stored` fits the model; removes RoPE frequencies."""
    for name in [name for name in stored if name.endswith(_DERIVED)]:
        del stored[name]
    remedy = ""
    spare = spare_pickle(directory)
    if spare:
        # A bot converted MobileLLM-125M to safetensors, and its file lacked the embeddings.
        remedy = f"The safetensors may be incomplete; move them away to read {spare} instead."
    elif HEAD not in stored and not config.tie_embeddings:
        remedy = (
            "If the embeddings are also the head, set tie_word_embeddings to true in config.json."
        )
    if config.num_blocks > len(stored):
        raise UserError(
            f"{directory} does not fit the config: it has {len(stored)} tensors for "
            f"num_hidden_layers={config.num_blocks}. {remedy}".rstrip()
        )
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    expected = their_shapes(config, config.num_blocks)
    check_shapes(expected, shapes, str(directory), remedy)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, where: Path) -> None:
    """Raises a `UserError` if the tokenizer has more tokens than the model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: its {tokenizer.file.name} has {tokenizer.vocab_size} tokens, but the model "
            f"has only model.vocab_size={config.vocab_size}; replace the file by the tokenizer "
            "that the model was trained with."
        )


def _open_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    if tokenizer_file(directory) is None:
        raise MissingFileError(
            f"{directory} holds no tokenizer; put its {' or '.join(TOKENIZER_FILES)} there."
        )
    tokenizer = load_tokenizer(directory)
    other = directory / SENTENCEPIECE_MODEL
    if tokenizer.vocab_size > config.vocab_size and file_kind.is_there(other):
        # Tokens were added to tokenizer.json, but not to the model.
        tokenizer = load_tokenizer(other)
    check_vocabulary(tokenizer, config, directory)
    return tokenizer


def _write_generation_config(file: Path, ends: Mapping[str, Any]) -> None:
    """Writes the tokens that begin and end a text; keeps the other settings of an imported file."""
    given = strict_json.read(file) if file.is_file() else {}
    _write_json(file, given | {key: value for key, value in ends.items() if value is not None})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(values, indent=2) + "\n")
