"""Writes a model as an ONNX graph, with its weights in a second file in the same folder.

The inputs are `tokens`, `length` (the number of tokens in the cache), `logits_from` (the index of
the first token that needs logits; -1 means only the last token), and the cache: a key array and a
value array for each application of a block. The outputs are `logits` and the new cache. A caller
that binds the same memory to a cache input and its output updates the cache in place. All
applications of a shared block use the same initializers. Tied embeddings and head use one
initializer.

Attention uses the operator com.microsoft.GroupQueryAttention. Quantized matrices use
com.microsoft.MatMulNBits and com.microsoft.GatherBlockQuantized. Every full build of ONNX Runtime
contains these three operators. All other operators are standard.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import jax.numpy as jnp
import numpy as np
import onnx

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.export.onnx.graph import MICROSOFT, WEIGHTS, Graph
from mobilellm_jax.export.source import DTYPES, narrowed
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.rope import rotation

FILE = "model.onnx"

_BITS = {"int8": 8, "int4": 4}
# Maps bits per weight to weights per scale. Rows are padded to a multiple of this number.
_BLOCK = {8: 64, 4: 32}
_INT8_PRODUCTS = 4  # With this level, MatMulNBits also quantizes activations, block by block.
# GroupQueryAttention applies RoPE only if head_dim is a multiple of 16. Zeros pad other heads.
_HEAD_MULTIPLE = 16
_END = np.iinfo(np.int64).max


def write(source: OpenedModel, folder: Path, precision: str) -> int:
    """Writes `model.onnx` and its weights; returns how many blocks they contain.

    ONNX Runtime converts float16 and bfloat16 weights to float32 when it loads the file. 64 weights
    share a scale in int8, and 32 in int4. With int4, only the blocks have 4 bits; the embeddings
    and the head have 8 bits.
    """
    config = source.config
    with (folder / WEIGHTS).open("wb") as weights:
        graph = Graph(weights)
        _write_model(graph, source, precision)
    (folder / FILE).write_bytes(graph.serialized())
    return config.num_blocks


class _Matrix(NamedTuple):
    """The names of a matrix's initializers, and its shape."""

    name: str
    inputs: int
    outputs: int
    bits: int = 0  # Bits per weight; 0 if the matrix is not quantized.
    scales: str = ""


class _Block(NamedTuple):
    """The weights of a block. The two norms are names of initializers in the graph."""

    attention_norm: str
    input: _Matrix  # The matrices of queries, keys and values, side by side.
    output: _Matrix
    feed_forward_norm: str
    wide: _Matrix  # The gate matrix and the up matrix side by side, or only the up matrix.
    down: _Matrix


def _write_model(graph: Graph, source: OpenedModel, precision: str) -> None:
    config, params = source.config, source.params
    bits = _BITS.get(precision, 0)
    store = DTYPES.get(precision, DTYPES["float32"])
    tokens = graph.input("tokens", np.int64, [1, "T"])
    length = graph.input("length", np.int32, [1])
    first = graph.input("logits_from", np.int64, [1])
    graph.output("logits", [1, "scored", config.vocab_size])

    table_VD = np.asarray(params["embedding"]["table"])
    # The table always has 8 bits: int4 increases the loss by 0.010 nats, and by 0.019 with a 4-bit
    # table.
    table_bits = 8 if bits else 0
    table = _add_matrix(graph, "embedding", table_VD, store, table_bits, as_rows=True)
    head = table
    if not config.tie_embeddings:
        head_VD = np.asarray(params["head"]["kernel"]).T
        head = _add_matrix(graph, "head", head_VD, store, table_bits, as_rows=True)
    blocks = [_add_block(graph, source, u, store, bits) for u in range(config.num_blocks)]
    context = _add_context(graph, config, tokens, length)
    x_1TD = _looked_up(graph, table, tokens)
    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    for slot, u in enumerate(order):
        block = blocks[u]
        normed_1TD = _normed(graph, x_1TD, block.attention_norm, config)
        out_1TQ = _attention(graph, _product(graph, normed_1TD, block.input), context, config, slot)
        x_1TD = graph.node("Add", x_1TD, _product(graph, out_1TQ, block.output))
        normed_1TD = _normed(graph, x_1TD, block.feed_forward_norm, config)
        wide_1TF = _activated(graph, _product(graph, normed_1TD, block.wide), config)
        x_1TD = graph.node("Add", x_1TD, _product(graph, wide_1TF, block.down))
    x_1TD = _sliced(graph, x_1TD, first, axis=1)
    scale = np.asarray(params["final_norm"]["scale"])
    x_1TD = _normed(graph, x_1TD, graph.constant("final_norm", scale), config)
    _score(graph, x_1TD, head)


def _add_block(
    graph: Graph, source: OpenedModel, u: int, store: np.dtype[Any], bits: int
) -> _Block:
    config = source.config
    blocks = source.params["blocks"]
    attention, feed_forward = blocks["attention"], blocks["feed_forward"]
    width = config.embed_dim

    def norm(name: str) -> str:
        return graph.constant(f"block_{u}.{name}", np.asarray(blocks[name]["scale"][u]))

    def matrix(name: str, *kernels: np.ndarray) -> _Matrix:
        return _add_matrix(graph, f"block_{u}.{name}", np.concatenate(kernels, 1).T, store, bits)

    def heads(name: str) -> np.ndarray:
        return _widened(np.asarray(attention[name][u]), axis=2).reshape(width, -1)

    out_NHD = _widened(np.asarray(attention["output"][u]), axis=1)
    return _Block(
        attention_norm=norm("attention_norm"),
        input=matrix("input", *(heads(name) for name in ("query", "key", "value"))),
        output=matrix("output", out_NHD.reshape(-1, width)),
        feed_forward_norm=norm("feed_forward_norm"),
        wide=matrix("wide", *(np.asarray(feed_forward[name][u]) for name in config.wide_matrices)),
        down=matrix("down", np.asarray(feed_forward["down"][u])),
    )


def _widened(heads: np.ndarray, axis: int) -> np.ndarray:
    """Pads each half of the head dim, because RoPE rotates channel i of both halves together."""
    *before, head_dim, after = *heads.shape[:axis], heads.shape[axis], heads.shape[axis + 1 :]
    halves = heads.reshape(*before, 2, head_dim // 2, *after)
    widths = [(0, 0)] * halves.ndim
    widths[axis + 1] = (0, (_head_width(head_dim) - head_dim) // 2)
    return np.pad(halves, widths).reshape(*before, -1, *after)


def _head_width(head_dim: int) -> int:
    return math.ceil(head_dim / _HEAD_MULTIPLE) * _HEAD_MULTIPLE


def _add_matrix(
    graph: Graph,
    name: str,
    weight_OI: np.ndarray,
    store: np.dtype[Any],
    bits: int,
    *,
    as_rows: bool = False,
) -> _Matrix:
    """Adds a matrix. `as_rows` stores it as [outputs, inputs], as embedding and head need it."""
    outputs, inputs = weight_OI.shape
    if bits:
        codes, scales = _quantized(weight_OI, bits)
        graph.constant(name, codes.reshape(outputs, -1) if as_rows else codes)
        return _Matrix(name, inputs, outputs, bits, graph.constant(f"{name}.scales", scales))
    graph.constant(name, narrowed(name, weight_OI if as_rows else weight_OI.T, str(store)))
    if store != np.float32:
        name = graph.node("Cast", name, to=onnx.TensorProto.FLOAT)
    return _Matrix(name, inputs, outputs)


def _quantized(weight_OI: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes [O, blocks, bytes] and scales [O, blocks]: weight = (code - 2^(bits-1)) scale.

    The codes stand for multiples of the scale from -2^(bits-1) to 2^(bits-1) - 1. Only the code 0
    reaches -2^(bits-1), so the weight furthest from zero gets the code 0. The scale is negative if
    this weight is positive.
    """
    (outputs, inputs), block = weight_OI.shape, _BLOCK[bits]
    padded = np.pad(weight_OI, ((0, 0), (0, -inputs % block)))
    blocks = padded.reshape(outputs, -1, block).astype(np.float32, copy=False)
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    middle = 1 << (bits - 1)
    scales = furthest / -middle
    steps = blocks / np.where(scales == 0, 1, scales)
    codes = np.clip(np.rint(steps) + middle, 0, 2 * middle - 1).astype(np.uint8)
    if bits == 4:  # A byte holds two codes, the first code in the low bits.
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes, scales[..., 0].astype(np.float32)


def _add_context(graph: Graph, config: ModelConfig, tokens: str, length: str) -> tuple[str, ...]:
    """Adds the shared inputs of all attention nodes: last position, length, cosines and sines."""
    new = graph.node("Shape", tokens, start=1, end=2)
    total = graph.node("Add", length, graph.node("Cast", new, to=onnx.TensorProto.INT32))
    one = graph.constant("one", np.ones(1, np.int32))
    positions_1S = jnp.arange(config.max_seq_len, dtype=jnp.int32)[None]
    turn = rotation(positions_1S, config)

    def angles(name: str, values_1S1H: Any) -> str:
        half = (_head_width(config.head_dim) - config.head_dim) // 2
        return graph.constant(name, np.pad(np.asarray(values_1S1H)[0, :, 0], ((0, 0), (0, half))))

    return (
        graph.node("Sub", total, one),
        graph.node("Squeeze", total),
        angles("cos", turn.cos_BT1P),
        angles("sin", turn.sin_BT1P),
    )


def _attention(
    graph: Graph, heads: str, context: Sequence[str], config: ModelConfig, slot: int
) -> str:
    """Adds the attention of one application of a block, with its own cache arrays."""
    width = _head_width(config.head_dim)
    shape = [1, config.num_kv_heads, config.max_seq_len, width]
    past = [graph.input(f"past_{kind}_{slot}", np.float32, shape) for kind in ("key", "value")]
    present = [graph.output(f"present_{kind}_{slot}", shape) for kind in ("key", "value")]
    return graph.node(
        *("GroupQueryAttention", heads, "", "", *past, *context),
        outputs=[f"attention_{slot}", *present],
        domain=MICROSOFT,
        num_heads=config.num_heads,
        kv_num_heads=config.num_kv_heads,
        scale=config.head_dim**-0.5,  # The stored heads may be wider, because of padding.
        do_rotary=1,
    )


def _normed(graph: Graph, x: str, scale: str, config: ModelConfig) -> str:
    return graph.node("RMSNormalization", x, scale, axis=-1, epsilon=config.norm_eps)


def _product(graph: Graph, x: str, matrix: _Matrix, codes: str = "") -> str:
    """Adds x times a matrix; `codes` names a reshaped copy of the quantized matrix, if given."""
    if not matrix.bits:
        return graph.node("MatMul", x, matrix.name)
    return graph.node(
        *("MatMulNBits", x, codes or matrix.name, matrix.scales),
        domain=MICROSOFT,
        K=matrix.inputs,
        N=matrix.outputs,
        bits=matrix.bits,
        block_size=_BLOCK[matrix.bits],
        accuracy_level=_INT8_PRODUCTS,
    )


def _activated(graph: Graph, wide: str, config: ModelConfig) -> str:
    match config.activation:
        case "swiglu":
            place = len(graph.nodes)
            gate, up = halves = [f"gate_{place}", f"up_{place}"]
            graph.node("Split", wide, outputs=halves, axis=-1, num_outputs=2)
            return graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
        case "relu":
            return graph.node("Relu", wide)
        case "gelu":
            return graph.node("Gelu", wide)  # GELU with the error function, not its tanh form.
        case _:
            assert_never(config.activation)


def _looked_up(graph: Graph, table: _Matrix, tokens: str) -> str:
    if not table.bits:
        return graph.node("Gather", table.name, tokens)
    rows = graph.node(
        *("GatherBlockQuantized", table.name, tokens, table.scales),
        domain=MICROSOFT,
        bits=table.bits,
        block_size=_BLOCK[table.bits],
        gather_axis=0,
        quantize_axis=1,
    )
    if table.inputs % _BLOCK[table.bits] == 0:
        return rows
    start = graph.constant("row_start", np.zeros(1, np.int64))
    return _sliced(graph, rows, start, axis=2, end=table.inputs)


def _sliced(graph: Graph, x: str, start: str, *, axis: int, end: int = _END) -> str:
    """Adds a node for x[start:end] along `axis`; `start` is the name of a value in the graph."""
    numbers = {f"end_{axis}": end, f"axis_{axis}": axis}
    names = [graph.constant(name, np.array([n], np.int64)) for name, n in numbers.items()]
    return graph.node("Slice", x, start, *names)


def _score(graph: Graph, x_1TD: str, head: _Matrix) -> None:
    """Adds the nodes that compute the logits; `head` has one row per token of the vocabulary."""
    if head.bits:
        shape = np.array([head.outputs, -1, _BLOCK[head.bits] * head.bits // 8], np.int64)
        codes = graph.node("Reshape", head.name, graph.constant("head_shape", shape))
        logits_1TV = _product(graph, x_1TD, head, codes)
    else:
        # Gemm can transpose `head`, so the file needs no transposed copy of the embedding table.
        first = graph.constant("first_axis", np.zeros(1, np.int64))
        x_TD = graph.node("Squeeze", x_1TD, first)
        logits_1TV = graph.node("Unsqueeze", graph.node("Gemm", x_TD, head.name, transB=1), first)
    graph.node("Identity", logits_1TV, outputs=["logits"])
