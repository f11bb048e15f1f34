"""Maps our parameters to the names and shapes of a Llama's tensors, for Hugging Face and GGUF."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.finite import non_finite, refuse_non_finite
from mobilellm_jax.storage.strict_json import plain

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LIST_LIMIT = 8

Shapes = Mapping[str, tuple[int, ...]]


class Row(NamedTuple):
    """A parameter, with its name in our model and its name in Hugging Face's.

    `axes` has a letter for each axis of our array. In a matrix, a comma separates the input axes
    from the output axes. Hugging Face stores the matrix transposed, as [outputs, inputs]: all
    output axes are flattened into one axis, and all input axes into another.
    """

    ours: str
    theirs: str  # "{}" stands for the number of the layer.
    axes: str

    def our_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape of our parameter, without the axis that stacks all blocks."""
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


_LAYER = "model.layers.{}."
_TABLE = (
    Row("embedding/table", EMBEDDING, "VD"),
    Row("final_norm/scale", "model.norm.weight", "D"),
    Row("head/kernel", HEAD, "D,V"),
    Row("blocks/attention_norm/scale", f"{_LAYER}input_layernorm.weight", "D"),
    Row("blocks/attention/query", f"{_LAYER}self_attn.q_proj.weight", "D,NH"),
    Row("blocks/attention/key", f"{_LAYER}self_attn.k_proj.weight", "D,KH"),
    Row("blocks/attention/value", f"{_LAYER}self_attn.v_proj.weight", "D,KH"),
    Row("blocks/attention/output", f"{_LAYER}self_attn.o_proj.weight", "NH,D"),
    Row("blocks/feed_forward_norm/scale", f"{_LAYER}post_attention_layernorm.weight", "D"),
    Row("blocks/feed_forward/gate", f"{_LAYER}mlp.gate_proj.weight", "D,F"),
    Row("blocks/feed_forward/up", f"{_LAYER}mlp.up_proj.weight", "D,F"),
    Row("blocks/feed_forward/down", f"{_LAYER}mlp.down_proj.weight", "F,D"),
)


def named_rows(config: ModelConfig, layers: int) -> Iterator[tuple[str, Row, int | None]]:
    """Yields the name, the row and the layer (or None) of every tensor, in file order."""
    absent = {"head/kernel"} if config.tie_embeddings else set()
    if "gate" not in config.wide_matrices:
        absent.add("blocks/feed_forward/gate")
    table = [row for row in _TABLE if row.ours not in absent]
    for row in table:
        if _LAYER not in row.theirs:
            yield row.theirs, row, None
    for layer in range(layers):
        for row in table:
            if _LAYER in row.theirs:
                yield row.theirs.format(layer), row, layer


def their_shapes(config: ModelConfig, layers: int) -> dict[str, tuple[int, ...]]:
    """Returns the tensor shapes, by name, of a model with `layers` stored layers."""
    return {name: row.their_shape(config) for name, row, _ in named_rows(config, layers)}


def their_tensors(
    config: ModelConfig, params: Mapping[str, Any], blocks: Sequence[int]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a model whose layer i is block `blocks[i]`; most are views."""
    flat: dict[str, np.ndarray] = {
        path: np.asarray(leaf)
        for path, leaf in traverse_util.flatten_dict(params, sep="/").items()  # type: ignore[no-untyped-call]  # flax
    }
    expected: dict[str, tuple[int, ...]] = {}
    for _, row, layer in named_rows(config, 1):
        stacked = () if layer is None else (config.num_blocks,)
        expected[row.ours] = (*stacked, *row.our_shape(config))
    check_shapes(expected, {path: a.shape for path, a in flat.items()}, "The parameter tree")
    for name, row, layer in named_rows(config, len(blocks)):
        array = flat[row.ours]
        yield name, row.to_theirs(array if layer is None else array[blocks[layer]], config)


def our_params(
    config: ModelConfig, read: Callable[[str], np.ndarray], source: Path
) -> dict[str, Any]:
    """Returns our parameter tree, in float32, of a model without repeats.

    Args:
      config: the model.
      read: returns the values of the tensor with Hugging Face's name.
      source: the file or folder of the tensors, for the message if a weight is not finite.
    """
    flat: dict[str, np.ndarray] = {}
    bad: list[str] = []
    for name, row, layer in named_rows(config, config.num_blocks):
        values = read(name).astype(np.float32)
        bad += non_finite(name, values)
        array = row.to_ours(values, config)
        if layer is None:
            flat[row.ours] = array
            continue
        if layer == 0:
            flat[row.ours] = np.empty((config.num_blocks, *array.shape), np.float32)
        flat[row.ours][layer] = array
    refuse_non_finite(source, bad)
    tree: dict[str, Any] = traverse_util.unflatten_dict(flat, sep="/")  # type: ignore[no-untyped-call]  # flax
    return tree


def check_shapes(expected: Shapes, found: Shapes, where: str, remedy: str = "") -> None:
    """Raises a `UserError` if the names or shapes of tensors differ."""
    lists = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [plain(name) for name in found if name not in expected],
        "of another shape": [
            f"{name} {found[name]}, not {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    if not any(lists.values()):
        return
    lines = [f"{where} does not fit the config."]
    for kind, names in lists.items():
        more = f" and {len(names) - _LIST_LIMIT} more" if len(names) > _LIST_LIMIT else ""
        lines.append(f"{kind}: {', '.join(names[:_LIST_LIMIT]) or 'none'}{more}")
    raise UserError("\n".join([*lines, remedy] if remedy else lines))


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
