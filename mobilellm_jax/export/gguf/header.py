"""Checks the header of a GGUF file before llama.cpp reads it.

llama.cpp ends the process if numbers in a file contradict each other. This module therefore reads
everything in front of the weights. It accepts only keys that an export writes, and tensors whose
shapes follow from these keys and that fill the file without gaps. The manifest protects the weights
themselves.

A GGUF file is little-endian. It contains "GGUF", a version, the numbers of tensors and keys, the
keys with type and value, and a line per tensor (name, axis lengths with the fastest first, type,
offset). The weights follow, and each tensor is padded to 32 bytes.
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mobilellm_jax.errors import UserError

_MAGIC, _VERSION = b"GGUF", 3
_ALIGNMENT = 32
_MOST_TENSORS, _MOST_KEYS, _MOST_ITEMS, _LONGEST_TEXT = 1 << 20, 64, 1 << 26, 1 << 20

_U32, _F32, _BOOL, _TEXT, _ARRAY, _I32 = 4, 6, 7, 8, 9, 5
_NUMBERS = {_U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?"}

# For every key that an export writes: its type, the type of its items, and whether it is required.
_KEYS: dict[str, tuple[int, int | None, bool]] = {
    "general.architecture": (_TEXT, None, True),
    "general.type": (_TEXT, None, False),
    "general.name": (_TEXT, None, False),
    "general.file_type": (_U32, None, False),
    "general.quantization_version": (_U32, None, False),
    "llama.vocab_size": (_U32, None, True),
    "llama.context_length": (_U32, None, True),
    "llama.embedding_length": (_U32, None, True),
    "llama.block_count": (_U32, None, True),
    "llama.feed_forward_length": (_U32, None, True),
    "llama.attention.head_count": (_U32, None, True),
    "llama.attention.head_count_kv": (_U32, None, True),
    "llama.attention.key_length": (_U32, None, True),
    "llama.attention.value_length": (_U32, None, True),
    "llama.attention.layer_norm_rms_epsilon": (_F32, None, True),
    "llama.rope.dimension_count": (_U32, None, True),
    "llama.rope.freq_base": (_F32, None, True),
    "tokenizer.ggml.model": (_TEXT, None, True),
    "tokenizer.ggml.pre": (_TEXT, None, True),
    "tokenizer.ggml.tokens": (_ARRAY, _TEXT, True),
    "tokenizer.ggml.token_type": (_ARRAY, _I32, True),
    "tokenizer.ggml.scores": (_ARRAY, _F32, False),
    "tokenizer.ggml.merges": (_ARRAY, _TEXT, False),
    "tokenizer.ggml.bos_token_id": (_U32, None, True),
    "tokenizer.ggml.eos_token_id": (_U32, None, True),
    "tokenizer.ggml.unknown_token_id": (_U32, None, False),
    "tokenizer.ggml.add_bos_token": (_BOOL, None, True),
    "tokenizer.ggml.add_eos_token": (_BOOL, None, True),
    "tokenizer.ggml.add_space_prefix": (_BOOL, None, True),
}

# For every tensor type that an export writes: weights per block, and bytes per block.
_TYPES = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    30: (1, 2),  # BF16
}


class Header(NamedTuple):
    """The description of the model in a GGUF file."""

    vocab_size: int
    context_length: int


class _DamagedError(UserError):
    """A fault in the file; the message follows the file's name."""


def check_header(file: Path) -> Header:
    """Reads and checks everything in front of the weights.

    Raises:
      UserError: if the file is not a GGUF file of an export, or is damaged.
    """
    with file.open("rb") as opened:
        size = file.stat().st_size
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{file} is no GGUF file: it does not begin with {_MAGIC.decode()}.")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _read(_Cursor(content), size)
            except _DamagedError as error:
                raise UserError(
                    f"{file} is damaged, or a GGUF file of another program: {error} Export again."
                ) from error


class _Cursor:
    """A position in the file that only moves forward."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self.offset = len(_MAGIC)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def bytes(self, count: int) -> bytes:
        if count > len(self._content) - self.offset:
            raise _DamagedError(f"it ends at byte {len(self._content):,}, within its header.")
        start, self.offset = self.offset, self.offset + count
        return self._content[start : self.offset]

    def text(self) -> str:
        start = self.offset
        length = self.number("<Q")
        if length > _LONGEST_TEXT:
            raise _DamagedError(f"the text at byte {start:,} would have {length:,} bytes.")
        content = self.bytes(length)
        if b"\0" in content:  # llama.cpp would end the text at a zero
            raise _DamagedError(f"the text at byte {start:,} has a zero in it.")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise _DamagedError(f"the text at byte {start:,} is not UTF-8.") from error

    def count(self, what: str, most: int) -> int:
        count: int = self.number("<Q")
        if count > most:
            raise _DamagedError(f"it would have {count:,} {what}.")
        return count


def _read(cursor: _Cursor, size: int) -> Header:
    version = cursor.number("<I")
    if version != _VERSION:
        raise _DamagedError(f"it has version {version}, and must have {_VERSION}.")
    tensors = cursor.count("tensors", _MOST_TENSORS)
    values = dict(_keys(cursor))
    _check_values(values)
    expected = _shapes(values, tensors)
    end = 0
    for _ in range(tensors):
        name, shape, kind, offset = _tensor(cursor)
        if expected.pop(name, None) != shape:
            raise _DamagedError(f"its tensor {name!r} of shape {shape} is not one of its model's.")
        block, block_bytes = _TYPES[kind]
        if shape[0] % block or (len(shape) == 1 and kind != 0):
            raise _DamagedError(f"its tensor {name!r} cannot have the type {kind}.")
        if offset != end:
            raise _DamagedError(f"its tensor {name!r} is at {offset:,}, and must be at {end:,}.")
        end += _padded(math.prod(shape) // block * block_bytes)
    if missing := next((name for name in expected if name != "output.weight"), None):
        raise _DamagedError(f"it has no tensor {missing!r}.")
    whole = _padded(cursor.offset) + end
    if size != whole:
        raise _DamagedError(f"it has {size:,} bytes, and must have {whole:,}.")
    return Header(values["llama.vocab_size"], values["llama.context_length"])


def _keys(cursor: _Cursor) -> Iterator[tuple[str, Any]]:
    read: set[str] = set()
    for _ in range(cursor.count("keys", _MOST_KEYS)):
        key = cursor.text()
        if key not in _KEYS or key in read:
            raise _DamagedError(f"its key {key[:80]!r} is not one of an export, or there twice.")
        read.add(key)
        kind, inner, _required = _KEYS[key]
        if cursor.number("<I") != kind or (inner is not None and cursor.number("<I") != inner):
            raise _DamagedError(f"its key {key} has another type.")
        if inner is None:
            yield key, _value(cursor, kind)()
        else:
            value = _value(cursor, inner)
            yield key, [value() for _ in range(cursor.count("items in a list", _MOST_ITEMS))]
    if missing := [key for key, (_, _, needed) in _KEYS.items() if needed and key not in read]:
        raise _DamagedError(f"it has no key {missing[0]}.")


def _value(cursor: _Cursor, kind: int) -> Callable[[], Any]:
    return cursor.text if kind == _TEXT else lambda: cursor.number(_NUMBERS[kind])


def _check_values(values: dict[str, Any]) -> None:
    def require(key: str, right: bool, rule: str) -> None:
        if not right:
            raise _DamagedError(f"its {key}={values[key]} must be {rule}.")

    architecture = values["general.architecture"]
    require("general.architecture", architecture == "llama", "llama")
    for key, (kind, _, _) in _KEYS.items():
        if key.startswith("llama.") and kind == _U32:
            require(key, 1 <= values[key] < 1 << 31, "at least 1 and less than 2^31")
        if kind == _F32:
            require(key, math.isfinite(values[key]) and values[key] > 0, "greater than 0")
    heads, kv_heads = (values[f"llama.attention.head_count{end}"] for end in ("", "_kv"))
    require("llama.attention.head_count", heads % kv_heads == 0, f"a multiple of {kv_heads}")
    head_dim = values["llama.rope.dimension_count"]
    require("llama.rope.dimension_count", head_dim % 2 == 0, "even")
    for name in ("key", "value"):
        key = f"llama.attention.{name}_length"
        require(key, values[key] == head_dim, f"{head_dim}, as llama.rope.dimension_count")
    tokens = values["llama.vocab_size"]
    for name in ("tokens", "token_type", "scores"):
        items = values.get(f"tokenizer.ggml.{name}")
        if items is not None and len(items) != tokens:
            raise _DamagedError(
                f"it has {len(items):,} tokenizer.ggml.{name} for {tokens:,} tokens."
            )
    if len(set(values["tokenizer.ggml.tokens"])) < tokens or "" in values["tokenizer.ggml.tokens"]:
        raise _DamagedError("one of its tokens is there twice, or empty.")
    for name in ("bos", "eos", "unknown"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in values:
            require(key, values[key] < tokens, f"less than {tokens:,}")
    model = values["tokenizer.ggml.model"]
    require("tokenizer.ggml.model", model in ("llama", "gpt2"), "llama or gpt2")
    if model == "llama" and "tokenizer.ggml.scores" not in values:
        raise _DamagedError("it has no key tokenizer.ggml.scores.")


def _shapes(values: dict[str, Any], tensors: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor that the model has or may have, inputs first."""
    wide = values["llama.embedding_length"]
    hidden = values["llama.feed_forward_length"]
    head_dim = values["llama.rope.dimension_count"]
    queries = values["llama.attention.head_count"] * head_dim
    keys = values["llama.attention.head_count_kv"] * head_dim
    tokens, blocks = values["llama.vocab_size"], values["llama.block_count"]
    if blocks > tensors:
        raise _DamagedError(f"it has {tensors:,} tensors for llama.block_count={blocks:,}.")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (wide, tokens),
        "output.weight": (wide, tokens),
        "output_norm.weight": (wide,),
    }
    block = {
        "attn_norm": (wide,),
        "attn_q": (wide, queries),
        "attn_k": (wide, keys),
        "attn_v": (wide, keys),
        "attn_output": (queries, wide),
        "ffn_norm": (wide,),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    for layer in range(blocks):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text()
    axes = cursor.number("<I")
    if not 1 <= axes <= 2:
        raise _DamagedError(f"its tensor {name[:80]!r} has {axes} axes.")
    shape = tuple(cursor.number("<Q") for _ in range(axes))
    kind = cursor.number("<I")
    if kind not in _TYPES:
        raise _DamagedError(
            f"its tensor {name[:80]!r} has the type {kind}, which no export writes."
        )
    return name, shape, kind, cursor.number("<Q")


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
