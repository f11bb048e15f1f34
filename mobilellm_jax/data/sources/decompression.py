"""Decompresses gzip and zstd files in chunks."""

import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from mobilellm_jax.errors import require

# Number of compressed bytes that are decompressed together, for gzip (True) and zstd (False). gzip
# can expand one byte to 1,032 bytes, and zstd can expand four bytes to 128 kB. A chunk therefore
# expands to a few dozen megabytes at most.
_CHUNK_BYTES = {True: 1 << 15, False: 1 << 10}
_GZIP = 16 + zlib.MAX_WBITS
# The largest corpora are compressed with `zstd --long=31`. Only such files need this much memory.
_ZSTD_WINDOW_BYTES = 1 << 31


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


def decompressed(file: BinaryIO, path: str) -> Iterator[bytes]:
    """Yields the contents of all gzip members (if `path` ends in .gz) or of all zstd frames.

    Raises:
      DamageError: if data are damaged or end too early. The contents before the damage are yielded
        first.
    """
    gzip = path.endswith(".gz")
    if gzip:
        failures: type[Exception] = zlib.error
    else:
        require("zstandard", "data", path)
        import zstandard

        failures = zstandard.ZstdError

    def member() -> Any:
        """Returns zlib's or zstandard's decompressor of the next member or frame."""
        if gzip:
            return zlib.decompressobj(_GZIP)
        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()

    current = member()
    begun = any_before = False
    while chunk := file.read(_CHUNK_BYTES[gzip]):
        while chunk:
            if gzip and any_before and not begun:
                chunk = chunk.lstrip(b"\0")  # Tapes and some tools append zeros.
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
