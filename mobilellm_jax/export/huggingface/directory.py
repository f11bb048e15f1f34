"""Hugging Face directories, written and read, by one table of names.

Two layouts are written. `hf` is a plain LlamaForCausalLM: shared blocks are written once per
application, so that any reader of Llama models computes the same. `mobilellm` holds every block
once, with the keys `layer_sharing` and `share_embedding` of the paper's code, and carries a
modelling file of ours; it also takes what plain Llama cannot express.
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
    """One parameter under its two names.

    `axes` are ours. A comma parts the input from the output axes of a matrix, which Hugging Face
    stores transposed, each side flattened to one axis.
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
# Angles that old versions stored although they follow from the config.
_DERIVED = "rotary_emb.inv_freq"


class Exported(NamedTuple):
    """What `write_huggingface` wrote."""

    tensor_bytes: int
    parameters: int  # as stored: shared blocks of the `hf` layout count once per application
    layers: int  # stored ones


class Imported(NamedTuple):
    """What `read_huggingface` found."""

    config: ModelConfig
    params: dict[str, Any]  # NumPy, float32
    tokenizer_file: Path
    dtype: Dtype  # of the stored weights; exporting with it gives their bits back


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
      config: of the model.
      params: its parameter tree, NumPy or JAX arrays.
      tokenizer: the run's; its files are written beside the weights.
      directory: to be made; it must not exist, unless empty.
      layout: see the module's docstring.
      dtype: of the stored weights.
      shard_bytes: weights beyond it are stored in several files.
      finish: is given the complete folder before it has its name, and may add to it or refuse it.

    Raises:
      UserError: if `layout` cannot express the model, or `dtype` a weight; if `directory` is not
        empty; if tokenizer.json cannot express the tokenizer.
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
    """Reads a directory of the Llama layout, of the paper's code, or of `write_huggingface`.

    Raises:
      MissingFileError: if there are no config.json, no weights or no tokenizer.
      UserError: if the model is none that `ModelConfig` expresses, or its tensors do not fit its
        config.
    """
    file = directory / CONFIG
    if not file.is_file():
        raise MissingFileError(f"{directory} is no Hugging Face directory: it has no {CONFIG}.")
    # Nothing that it names as code (auto_map) is looked at.
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
        # Of several, only float32 holds all values.
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
    """Returns the rows whose parameters the model has."""
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
        with np.errstate(over="ignore"):  # found below, and named
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
    """Refuses tensors that do not fit; takes out those that only repeat others."""
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
        # The safetensors that a bot made of MobileLLM-125M lacked the embeddings.
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
    """Raises a ValueError with three lists unless the names and shapes are the same."""
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
    """Returns the tokenizer's file: the SentencePiece model, unless only the other one fits.

    A model with added tokens has them in its tokenizer.json alone.
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
