"""Compressed files as the bytes that were compressed, a chunk at a time."""

import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

# What a chunk decompresses to is in memory at once. gzip can make 1,032 bytes of one, zstd 128 kB
# of four: a few dozen megabytes either way.
_CHUNK_BYTES = {True: 1 << 15, False: 1 << 10}
_GZIP = 16 + zlib.MAX_WBITS
# `zstd --long=31`, with which the largest corpora are compressed; it costs memory only there.
_ZSTD_WINDOW_BYTES = 1 << 31


class DamageError(Exception):
    """Compressed data end too early, or are no such data."""


class _Decompressor(Protocol):
    """Of one gzip member or one zstd frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class ChunkedFile(io.RawIOBase):
    """ChunkedFile of bytes as a file, for a buffer to find lines in."""

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


def decompressed(file: BinaryIO, path: str) -> Iterator[bytes]:
    """Yields the text of all gzip members or zstd frames, one after the other.

    Args:
      file: of the compressed bytes.
      path: its name; one in .gz is gzip's, another zstd's.

    Raises:
      DamageError: in the place where it is damaged or ends too early, after what lies before it.
    """
    gzip = path.endswith(".gz")
    if gzip:
        failures: type[Exception] = zlib.error
    else:
        import zstandard

        failures = zstandard.ZstdError

    def member() -> _Decompressor:
        if gzip:
            return zlib.decompressobj(_GZIP)
        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()

    current = member()
    begun = any_before = False
    while chunk := file.read(_CHUNK_BYTES[gzip]):
        while chunk:
            if gzip and any_before and not begun:
                chunk = chunk.lstrip(b"\0")  # tapes and some tools fill up with zeros
                if not chunk:
                    break
            begun = True
            try:
                text = current.decompress(chunk)
            except failures as error:
                raise DamageError(f"damaged ({error})") from error
            if text:
                yield text
            chunk = b""
            if current.eof:
                chunk = current.unused_data
                current = member()
                begun, any_before = False, True
    if begun or not any_before:
        raise DamageError("cut off: the compressed data end too early")
