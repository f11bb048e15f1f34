"""Decompresses gzip, bzip2, xz and zstd files in chunks."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from mobilellm_jax.errors import require

_GZIP = 16 + zlib.MAX_WBITS
# The largest corpora are compressed with `zstd --long=31`. Only such files need this much memory.
_ZSTD_WINDOW_BYTES = 1 << 31
_STEP_BYTES = 1 << 24
_CHUNK_BYTES = {"gzip": 1 << 15, "bzip2": 1 << 15, "xz": 1 << 15, "zstd": 1 << 10}


class DamageError(Exception):
    """Compressed data end too early, or are damaged."""


class ChunkedFile(io.RawIOBase):
    """Presents chunks of bytes as a file, so that `io.BufferedReader` can read lines from them."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


class _Format(NamedTuple):
    """A compressed format.

    `chunk_bytes` of compressed data are decompressed together. gzip can expand one byte to 1,032
    bytes, and zstd can expand four bytes to 128 kB. A chunk therefore expands to a few dozen
    megabytes at most. bzip2 can expand 45 bytes to 45 MB, so the decompressors of bzip2 and xz work
    `in_steps`. `decompressor` makes the object that decompresses one gzip member or zstd frame or
    the like. This object raises `failures` if the data are damaged.
    """

    chunk_bytes: int
    decompressor: Callable[[], Any]
    failures: type[Exception]
    in_steps: bool = False

    def texts(self, decompressor: Any, chunk: bytes) -> Iterator[bytes]:
        """Yields the decompressed contents of a chunk; `decompressor` keeps what is incomplete."""
        if not self.in_steps:
            yield decompressor.decompress(chunk)
            return
        yield decompressor.decompress(chunk, _STEP_BYTES)
        while not decompressor.eof and not decompressor.needs_input:
            yield decompressor.decompress(b"", _STEP_BYTES)


def decompressed(file: BinaryIO, compression: str, name: str) -> Iterator[bytes]:
    """Yields the contents of all gzip members, bzip2 or xz streams, or zstd frames of a file.

    `compression` is a result of `file_kind.compression`; `name` is the file's name for messages.

    Raises:
      DamageError: if data are damaged or end too early. The contents before the damage are yielded
        first.
    """
    format_ = _format(compression, name)
    current = format_.decompressor()
    begun = any_before = False
    while chunk := file.read(format_.chunk_bytes):
        while chunk:
            if any_before and not begun:
                chunk = chunk.lstrip(b"\0")  # Tapes and some tools append zeros.
                if not chunk:
                    break
            begun = True
            try:
                yield from filter(None, format_.texts(current, chunk))
            except format_.failures as error:
                raise DamageError(f"damaged ({error})") from error
            chunk = b""
            if current.eof:
                chunk = current.unused_data
                current = format_.decompressor()
                begun, any_before = False, True
    if begun or not any_before:
        raise DamageError("cut off: the compressed data end too early")


def _format(compression: str, name: str) -> _Format:
    chunk = _CHUNK_BYTES[compression]
    if compression == "gzip":
        return _Format(chunk, lambda: zlib.decompressobj(_GZIP), zlib.error)
    if compression == "bzip2":
        return _Format(chunk, bz2.BZ2Decompressor, OSError, in_steps=True)
    if compression == "xz":
        return _Format(
            chunk,
            lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
            lzma.LZMAError,
            in_steps=True,
        )
    assert compression == "zstd", f"{compression} is not a format of file_kind"
    require("zstandard", "data", name)
    import zstandard

    return _Format(
        chunk,
        lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj(),
        zstandard.ZstdError,
    )
