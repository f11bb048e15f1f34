"""Reads the container of a GGUF file: the metadata and the tensors.

Any program may have written the file, so every number in it is checked before it is used. The
package `gguf` has a reader too, but for a false length it computes without end. It is used here for
the sizes of the types, and to turn quantized tensors into floats.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.storage import file_kind
from mobilellm_jax.storage.strict_json import plain, shown

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_AXES = 4
_BOOL, _STRING, _ARRAY = 7, 8, 9
# The number types of metadata, little-endian.
_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "|b1"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}


class Tensor(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]  # As NumPy has it: the last axis is contiguous.
    kind: Any  # A gguf.GGMLQuantizationType.
    start: int  # Offset in the file.
    size: int  # In bytes.


class Container:
    """A GGUF file: its metadata as Python values, and its tensors."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._content = _mapped(file)
        cursor = _Cursor(file, self._content)
        version, tensors, pairs = cursor.start()
        if version not in _VERSIONS:
            raise UserError(
                f"{file} has version {version} of GGUF; only {' and '.join(map(str, _VERSIONS))} "
                "can be read. Convert the model again with a newer llama.cpp."
            )
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.text()
            if key in self.metadata:
                raise cursor.damaged(f"it has the key {plain(key)} twice")
            self.metadata[key] = cursor.value(cursor.number("<u4"))
        self.tensors = dict(self._tensors(cursor, tensors))

    def read(self, name: str) -> np.ndarray:
        """Returns the values of a tensor in float32; quantized values are turned into floats."""
        tensor = self.tensors[name]
        stored = np.frombuffer(self._content, np.uint8, tensor.size, tensor.start)
        rows = stored.reshape(*tensor.shape[:-1], -1) if math.prod(tensor.shape) else stored
        try:
            values: np.ndarray = gguf.dequantize(rows, tensor.kind)
        except NotImplementedError as error:
            raise UserError(
                f"{self.file}: {plain(name)} has type {tensor.kind.name}, which the package gguf "
                "cannot turn into floats."
            ) from error
        return values.astype(np.float32, copy=False).reshape(tensor.shape)

    def _tensors(self, cursor: "_Cursor", count: int) -> Iterator[tuple[str, Tensor]]:
        found: dict[str, tuple[tuple[int, ...], Any, int]] = {}
        for _ in range(count):
            name, axes = cursor.text(), cursor.number("<u4")
            if name in found or axes > _MOST_AXES:
                raise cursor.damaged(f"{plain(name)} occurs twice or has {axes} axes")
            shape = tuple(cursor.number("<u8") for _ in range(axes))[::-1]
            found[name] = shape, _kind(cursor, name), cursor.number("<u8")
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise cursor.damaged(f"general.alignment={shown(alignment)} is not above 0")
        data = -(-cursor.at // alignment) * alignment
        for name, (shape, kind, offset) in found.items():
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            values, width = math.prod(shape), shape[-1] if shape else 1
            tensor = Tensor(shape, kind, data + offset, values // block * block_bytes)
            if width % block or tensor.start + tensor.size > len(self._content):
                raise cursor.damaged(f"{plain(name)} reaches beyond its end")
            yield name, tensor


def _mapped(file: Path) -> mmap.mmap:
    if not file.is_file():
        raise MissingFileError(f"{file} {file_kind.absence(file)}.")
    first = file_kind.first_bytes(file)
    if not first.startswith(MAGIC):
        raise UserError(f"{file} is not a GGUF file{file_kind.explanation(first)}.")
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _kind(cursor: "_Cursor", name: str) -> Any:
    number = cursor.number("<u4")
    try:
        return gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise UserError(
            f"{cursor.file}: {plain(name)} has type {number}, which the package gguf does not "
            "know; a newer version of it may."
        ) from error


class _Cursor:
    """A place in a file; every method reads there and moves on."""

    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self.file = file
        self.at = len(MAGIC)
        self._content = content

    def damaged(self, problem: str) -> UserError:
        return UserError(f"{self.file} is damaged: {problem}. Fetch the file again.")

    def start(self) -> tuple[int, int, int]:
        """Returns the version, the number of tensors and the number of metadata."""
        return self.number("<u4"), self.number("<u8"), self.number("<u8")

    def number(self, kind: str) -> int:
        return int(self._numbers(kind, 1)[0])

    def text(self) -> str:
        [size] = struct.unpack("<Q", self._take(8))
        try:
            return self._take(size).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text in it is not UTF-8 ({error.reason})") from error

    def value(self, kind: int) -> Any:
        """Returns a value of the metadata: a number, a text, or a list of them."""
        if kind != _ARRAY:
            return self._values(kind, 1)[0]
        inner, count = self.number("<u4"), self.number("<u8")
        return self._values(inner, count)

    def _values(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            # A text takes 8 bytes at least, so a false number of texts ends at the file's end.
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            raise self.damaged(f"it has a value of type {kind}")
        values: list[Any] = self._numbers(_NUMBERS[kind], count).tolist()
        return values

    def _numbers(self, kind: str, count: int) -> np.ndarray:
        return np.frombuffer(self._take(np.dtype(kind).itemsize * count), kind)

    def _take(self, size: int) -> bytes:
        if size > len(self._content) - self.at:
            raise self.damaged("it ends too early")
        self.at += size
        return self._content[self.at - size : self.at]
