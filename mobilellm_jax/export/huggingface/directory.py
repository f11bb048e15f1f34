"""Writes and reads Hugging Face directories, with one table of names.

There are two layouts. `hf` is a plain LlamaForCausalLM that contains a shared block once per
application, so any reader of Llama models computes the same. `mobilellm` contains every block once,
with the keys `layer_sharing` and `share_embedding` of the paper's code, and a modelling file of
ours. It also takes models that a plain Llama cannot express.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import traverse_util

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.export.huggingface.config import (
    MODELING_FILE,
    Layout,
    check_llama,
    from_config_json,
    to_config_json,
)
from mobilellm_jax.export.huggingface.tokenizer_files import write_tokenizer_files
from mobilellm_jax.export.huggingface.weight_files import (
    DTYPES,
    SHARD_BYTES,
    StoredTensor,
    open_tensors,
    spare_pickle,
    write_tensors,
)
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.rundir import TOKENIZER_FILES, whole_directory, write_whole
from mobilellm_jax.storage.strict_json import plain

Dtype = Literal["float32", "bfloat16", "float16"]

CONFIG = "config.json"
_LIST_LIMIT = 8


class _Row(NamedTuple):
    """A parameter with its two names.

    `axes` are the axes of our array. A comma separates the input axes of a matrix from its output
    axes. Hugging Face stores the transposed matrix, with each side flattened to one axis.
    """

    ours: str
    theirs: str
    axes: str

    def our_shape(self, config: ModelConfig) -> tuple[int, ...]:
        return _sizes(self.axes.replace(",", ""), config)

    def their_shape(self, config: ModelConfig) -> tuple[int, ...]:
        if "," not in self.axes:
            return _sizes(self.axes, config)
        inputs, outputs = (math.prod(_sizes(side, config)) for side in self.axes.split(","))
        return outputs, inputs

    def to_theirs(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        if "," not in self.axes:
            return array
        return array.reshape(self.their_shape(config)[::-1]).T

    def to_ours(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        return (array.T if "," in self.axes else array).reshape(self.our_shape(config))


_TABLE = (
    _Row("embedding/table", "model.embed_tokens.weight", "VD"),
    _Row("final_norm/scale", "model.norm.weight", "D"),
    _Row("head/kernel", "lm_head.weight", "D,V"),
)
_BLOCK = "model.layers.{}."
_BLOCK_TABLE = (
    _Row("blocks/attention_norm/scale", f"{_BLOCK}input_layernorm.weight", "D"),
    _Row("blocks/attention/query", f"{_BLOCK}self_attn.q_proj.weight", "D,NH"),
    _Row("blocks/attention/key", f"{_BLOCK}self_attn.k_proj.weight", "D,KH"),
    _Row("blocks/attention/value", f"{_BLOCK}self_attn.v_proj.weight", "D,KH"),
    _Row("blocks/attention/output", f"{_BLOCK}self_attn.o_proj.weight", "NH,D"),
    _Row("blocks/feed_forward_norm/scale", f"{_BLOCK}post_attention_layernorm.weight", "D"),
    _Row("blocks/feed_forward/gate", f"{_BLOCK}mlp.gate_proj.weight", "D,F"),
    _Row("blocks/feed_forward/up", f"{_BLOCK}mlp.up_proj.weight", "D,F"),
    _Row("blocks/feed_forward/down", f"{_BLOCK}mlp.down_proj.weight", "F,D"),
)
_EMBEDDING, _, _HEAD = (row.theirs for row in _TABLE)
# Old versions stored these angles, which follow from the config.
_DERIVED = "rotary_emb.inv_freq"


class Exported(NamedTuple):
    """The result of `write_huggingface`."""

    tensor_bytes: int
    # number of stored layers; the `hf` layout counts a shared block once per application
    parameters: int
    layers: int  # stored ones


class Imported(NamedTuple):
    """The result of `read_huggingface`."""

    config: ModelConfig
    params: dict[str, Any]  # NumPy, float32
    tokenizer_file: Path
    dtype: Dtype  # dtype of the stored weights; an export with this dtype gives the same bits


def write_huggingface(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    layout: Layout = "hf",
    dtype: Dtype = "float32",
    shard_bytes: int = SHARD_BYTES,
    finish: Callable[[Path], None] | None = None,
) -> Exported:
    """Writes a complete Hugging Face directory, which appears whole or not at all.

    Args:
      config: the model's config.
      params: the model's parameter tree of NumPy or JAX arrays.
      tokenizer: the run's tokenizer; its files are written beside the weights.
      directory: folder to create; an empty folder may exist.
      layout: `hf` or `mobilellm`, see the module's docstring.
      dtype: dtype of the stored weights.
      shard_bytes: more bytes of weights than this are stored in several files.
      finish: gets the complete folder before it has its name; it may add files, or raise.

    Raises:
      UserError: if `layout` cannot express the model, if `dtype` cannot express a weight, if
        `directory` is not empty, or if tokenizer.json cannot express the tokenizer.
    """
    if layout == "hf":
        check_llama(config)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists; give a new folder, or delete this one first.")
    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    blocks = order if layout == "hf" else range(config.num_blocks)
    counted = 0

    def counting(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        nonlocal counted
        for name, tensor in tensors:
            counted += tensor.size
            yield name, tensor

    values = to_config_json(config, len(blocks), layout)
    values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    # transformers 4 reads torch_dtype.
    values |= {"dtype": dtype, "torch_dtype": dtype}
    with whole_directory(directory) as folder:
        write_tokenizer_files(tokenizer, folder, config.max_seq_len)
        tensors = counting(_their_tensors(config, params, blocks, dtype))
        tensor_bytes = write_tensors(tensors, folder, shard_bytes)
        _write_json(folder / "generation_config.json", generation)
        _write_json(folder / CONFIG, values)
        if layout == "mobilellm":
            shutil.copyfile(Path(__file__).with_name(MODELING_FILE), folder / MODELING_FILE)
        if finish is not None:
            finish(folder)
    return Exported(tensor_bytes, counted, len(blocks))


def read_huggingface(directory: Path) -> Imported:
    """Reads a directory with the Llama layout, of the paper's code, or of `write_huggingface`.

    Raises:
      MissingFileError: if config.json, the weights or the tokenizer is missing.
      UserError: if `ModelConfig` cannot express the model, or its tensors do not fit its config.
    """
    file = directory / CONFIG
    if not file.is_file():
        raise MissingFileError(f"{directory} is no Hugging Face directory: it has no {CONFIG}.")
    # Code that the directory names (auto_map) is never read.
    values = strict_json.as_type(strict_json.read(file), dict[str, Any], str(file))
    config = from_config_json(values, file)
    stored = open_tensors(directory)
    _check_tensors(config, stored, directory)

    def read(row: _Row, block: int | None = None) -> np.ndarray:
        tensor = stored[row.theirs.format(block)].read().astype(np.float32)
        return row.to_ours(tensor, config)

    flat = {row.ours: read(row) for row in _rows(_TABLE, config)}
    for row in _rows(_BLOCK_TABLE, config):
        shape = (config.num_blocks, *row.our_shape(config))
        flat[row.ours] = stacked = np.empty(shape, np.float32)
        for block in range(config.num_blocks):
            stacked[block] = read(row, block)
    dtypes = {stored[name].dtype for name in _their_shapes(config, range(config.num_blocks))}
    return Imported(
        config=config,
        params=traverse_util.unflatten_dict(flat, sep="/"),  # type: ignore[no-untyped-call]  # flax
        tokenizer_file=_tokenizer_file(directory, config.vocab_size),
        # If the weights have several dtypes, only float32 holds all values.
        dtype=dtypes.pop() if len(dtypes) == 1 else "float32",  # type: ignore[arg-type]  # of DTYPES
    )


def _sizes(axes: str, config: ModelConfig) -> tuple[int, ...]:
    size = {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.ffn_dim,
    }
    return tuple(size[axis] for axis in axes)


def _rows(table: Sequence[_Row], config: ModelConfig) -> list[_Row]:
    """Returns the rows of the table for the parameters that the model has."""
    absent = {"head/kernel"} if config.tie_embeddings else set()
    if config.activation != "swiglu":
        absent.add("blocks/feed_forward/gate")
    return [row for row in table if row.ours not in absent]


def _their_shapes(config: ModelConfig, blocks: Sequence[int]) -> dict[str, tuple[int, ...]]:
    shapes = {row.theirs: row.their_shape(config) for row in _rows(_TABLE, config)}
    for row in _rows(_BLOCK_TABLE, config):
        for i in range(len(blocks)):
            shapes[row.theirs.format(i)] = row.their_shape(config)
    return shapes


def _their_tensors(
    config: ModelConfig, params: Mapping[str, Any], blocks: Sequence[int], dtype: Dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the named tensors of a model whose layer i is block `blocks[i]`, in `dtype`."""
    flat: dict[str, np.ndarray] = {
        path: np.asarray(leaf)
        for path, leaf in traverse_util.flatten_dict(params, sep="/").items()  # type: ignore[no-untyped-call]  # flax
    }
    expected = {row.ours: row.our_shape(config) for row in _rows(_TABLE, config)}
    for row in _rows(_BLOCK_TABLE, config):
        expected[row.ours] = (config.num_blocks, *row.our_shape(config))
    _check_lists(expected, {path: a.shape for path, a in flat.items()}, "The parameter tree")

    def converted(row: _Row, array: np.ndarray, name: str) -> tuple[str, np.ndarray]:
        with np.errstate(over="ignore"):  # other functions use this name
            tensor = row.to_theirs(array, config).astype(DTYPES[dtype])
        if not np.isfinite(tensor.astype(np.float32)).all():
            beyond = "" if not np.isfinite(array).all() else "; use --dtype=bfloat16 or float32"
            raise UserError(f"{name} holds values that are not finite in dtype={dtype}{beyond}.")
        return name, tensor

    for row in _rows(_TABLE, config):
        yield converted(row, flat[row.ours], row.theirs)
    for i, block in enumerate(blocks):
        for row in _rows(_BLOCK_TABLE, config):
            yield converted(row, flat[row.ours][block], row.theirs.format(i))


def _check_tensors(config: ModelConfig, stored: dict[str, StoredTensor], directory: Path) -> None:
    """Checks that the tensors fit the model, and removes tensors that repeat other ones."""
    for name in [name for name in stored if name.endswith(_DERIVED)]:
        del stored[name]
    both = config.tie_embeddings and {_HEAD, _EMBEDDING} <= stored.keys()
    if both and stored[_HEAD].shape == stored[_EMBEDDING].shape:
        if not np.array_equal(stored[_HEAD].read(), stored[_EMBEDDING].read()):
            raise UserError(
                f"{directory}: config.json ties the embeddings, but {_HEAD} and {_EMBEDDING} "
                "differ; if the model is not tied, set tie_word_embeddings (and share_embedding) "
                "to false in config.json."
            )
        del stored[_HEAD]
    remedy = ""
    spare = spare_pickle(directory)
    if spare:
        # The safetensors file that a bot made of MobileLLM-125M lacked the embeddings.
        remedy = f"The safetensors may be broken; move them away, and {spare} beside is read."
    elif _HEAD not in stored and not config.tie_embeddings:
        remedy = "If its head is its embeddings, set tie_word_embeddings to true in config.json."
    if config.num_blocks > len(stored):
        raise UserError(
            f"{directory} does not fit the config: it has {len(stored)} tensors for "
            f"num_hidden_layers={config.num_blocks}. {remedy}".rstrip()
        )
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    expected = _their_shapes(config, range(config.num_blocks))
    _check_lists(expected, shapes, str(directory), remedy)


def _check_lists(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    remedy: str = "",
) -> None:
    """Checks that names and shapes are equal.

    Raises:
      UserError: with three lists: only in the file, only in the model, different shapes.
    """
    both = [name for name in expected if name in found]
    lists = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [plain(name) for name in found if name not in expected],
        "of another shape": [
            f"{name} {found[name]}, not {expected[name]}"
            for name in both
            if found[name] != expected[name]
        ],
    }
    if not any(lists.values()):
        return
    lines = [f"{where} does not fit the config."]
    for kind, names in lists.items():
        more = f" and {len(names) - _LIST_LIMIT} more" if len(names) > _LIST_LIMIT else ""
        lines.append(f"{kind}: {', '.join(names[:_LIST_LIMIT]) or 'none'}{more}")
    raise UserError("\n".join([*lines, remedy] if remedy else lines))


def _tokenizer_file(directory: Path, vocab_size: int) -> Path:
    """Returns the tokenizer's file; a SentencePiece model comes first if it fits.

    A model with added tokens has them only in its tokenizer.json.
    """
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not files:
        raise MissingFileError(
            f"{directory} holds no tokenizer; put its {' or '.join(TOKENIZER_FILES)} there."
        )
    if len(files) == 2 and load_tokenizer(files[0]).vocab_size != vocab_size:
        return next((f for f in files if load_tokenizer(f).vocab_size == vocab_size), files[0])
    return files[0]


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(values, indent=2) + "\n")
