"""Opens and reads the files of a corpus, on this machine or at a URL."""

import abc
import contextlib
import functools
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from mobilellm_jax.data.sources import source
from mobilellm_jax.data.sources.finding import (
    File,
    filesystem_of,
    find,
    identity,
    unreachable,
)
from mobilellm_jax.data.sources.source import TRAIN, BadLine, BadLineError, Piece, Source
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import file_kind
from mobilellm_jax.storage.decompression import ChunkedFile, DamageError, decompressed

_BUFFER_BYTES = 1 << 20
DOCUMENT_BYTES = 1 << 28
"""Largest size in bytes of a line, or of a file that is one document.

This limit protects the memory: a few compressed kilobytes can expand to terabytes, and tokenizing a
tenth of this size already takes gigabytes.
"""
# A Git LFS or git-annex pointer has such a size. Before the work begins, the first
# `_POINTERS_CHECKED` files of such a size are checked. Later files are checked when they are read.
_POINTER_BYTES = range(60, 200)
_POINTERS_CHECKED = 1_000


class Part(NamedTuple):
    """A range of a file: `where` identifies it, `text_bytes` and `stored_bytes` are its sizes."""

    where: tuple[Any, ...]
    text_bytes: int
    stored_bytes: int


class FileSource(Source):
    """A source of the files that match a pattern; all its documents are in the training split."""

    def __init__(self, spec: str, pattern: str) -> None:
        super().__init__(spec)
        self._pattern = pattern

    def splits(self) -> tuple[str, ...]:
        return (TRAIN,)

    def identity(self) -> str:
        return identity(self.spec, self._files)

    def files(self) -> Sequence[File]:
        return self._files

    def pieces(self, split: str) -> list[Piece]:
        assert split == TRAIN, f"{self.spec} has no split {split}"
        return pack(self.spec, self._parts)

    @property
    @abc.abstractmethod
    def _parts(self) -> Iterable[Part]:
        """Ranges of the files, in their order, that can be read separately."""

    @functools.cached_property
    def _files(self) -> list[File]:
        return find(self.spec, self._pattern)

    @functools.cached_property
    def _checked_files(self) -> list[File]:
        """The files, after a check that the first small ones are not pointers."""
        small = (f for f in self._files if f.size_bytes in _POINTER_BYTES and "://" not in f.path)
        for file in itertools.islice(small, _POINTERS_CHECKED):
            with opened(file.path, file.size_bytes) as content:
                first_bytes(content, file.path)
        return self._files


def pack(spec: str, parts: Iterable[Part]) -> list[Piece]:
    """Joins `parts` in order into pieces of up to `PIECE_BYTES` of text; one part may be larger."""
    pieces: list[Piece] = []
    held: list[Part] = []

    def close() -> None:
        if held:
            stored = sum(part.stored_bytes for part in held)
            pieces.append(Piece(spec, TRAIN, stored, tuple(part.where for part in held)))
            held.clear()

    text_bytes = 0
    for part in parts:
        if text_bytes + part.text_bytes > source.PIECE_BYTES:
            close()
            text_bytes = 0
        held.append(part)
        text_bytes += part.text_bytes
    close()
    return pieces


def cuts(total: int, count: int) -> Iterator[tuple[int, int]]:
    """Yields `count` ranges (start, stop) of nearly equal size that together cover [0, total)."""
    for i in range(count):
        yield i * total // count, (i + 1) * total // count


@contextlib.contextmanager
def opened(path: str, size_bytes: int) -> Iterator[BinaryIO]:
    """Opens a file without decompression; raises a UserError if its size is not `size_bytes`."""
    if "://" in path:
        filesystem, inner = filesystem_of(path, path)
        try:
            raw = filesystem.open(inner, "rb")
        except Exception as error:  # Each storage system has its own errors.
            raise unreachable("A source", path, error) from error
        buffered: BinaryIO = io.BufferedReader(_Remote(raw, path), _BUFFER_BYTES)
    else:
        buffered = open(path, "rb", buffering=_BUFFER_BYTES)
    with buffered as file:
        now = file.seek(0, os.SEEK_END)
        if now != size_bytes:
            raise UserError(
                f"{path} has {now} bytes now, and had {size_bytes} when it was listed; files must "
                "not change while they are read. Start again when the file is complete."
            )
        file.seek(0)
        yield file


class _Remote(io.RawIOBase):
    """A file at a URL; names the file if the server fails while the file is read.

    If a server ends its answers too early, fsspec returns no bytes and no error. The rest of the
    file would then be lost in silence.
    """

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return int(self._file.seek(offset, whence))
        except Exception as error:  # Each storage system has its own errors.
            raise self._failed(error) from error

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        start = self._file.tell()
        try:
            content = self._file.read(len(buffer))
        except Exception as error:
            raise self._failed(error) from error
        if not content and start < self._file.size:
            raise self._failed(EOFError(f"it ends after {start:,} of {self._file.size:,} bytes"))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _failed(self, error: Exception) -> UserError:
        return unreachable("A source", self._url, error)


def first_bytes(file: BinaryIO, path: str) -> bytes:
    """Returns the first bytes of a file, and goes back to its start; refuses pointers.

    Raises:
      UserError: if the file is a pointer of Git LFS or git-annex, or an archive.
    """
    first = file.read(file_kind.FIRST_BYTES)
    file.seek(0)
    file_kind.refuse_stand_in(path, first)
    return first


def is_compressed(file: File) -> bool:
    """Returns whether the contents of a file are compressed."""
    with opened(file.path, file.size_bytes) as content:
        return file_kind.compression(file.path, first_bytes(content, file.path)) is not None


def contents(path: str, size_bytes: int) -> bytes:
    """Returns the whole contents of a file, decompressed if the file is compressed.

    Raises:
      BadLineError: if a compressed file is truncated or damaged, or the contents are too long.
    """
    with opened(path, size_bytes) as file:
        compression = file_kind.compression(path, first_bytes(file, path))
        if compression is None:
            if size_bytes > DOCUMENT_BYTES:
                raise _too_long(path, 1, 0)
            return file.read()
        content = io.BytesIO()
        try:
            for chunk in _decompressed(file, compression, path):
                content.write(chunk)
                if content.tell() > DOCUMENT_BYTES:
                    raise _too_long(path, 1, 0)
        except DamageError as damage:
            text = content.getvalue()
            raise _lost(path, text.count(b"\n") + 1, len(text), damage) from damage
        return content.getvalue()


def lines(path: str, size_bytes: int, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    r"""Yields (offset, line) for each line that starts in [start, stop); `line` includes its "\n".

    The last line of a file may have no "\n". For a compressed file, the function yields all lines,
    with offsets in the decompressed text. Only one line is in memory at a time.

    Raises:
      BadLineError: if a compressed file is truncated or damaged, or a line is too long.
    """
    with opened(path, size_bytes) as file:
        offset = start
        if start:
            # The line that contains the byte before `start` belongs to an earlier piece, so it is
            # skipped. Only uncompressed files are divided, so no check for compression is needed.
            file.seek(start - 1)
            offset -= 1
            while True:
                rest = file.readline(_BUFFER_BYTES)
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
                if not rest or offset >= stop:
                    return
        elif compression := file_kind.compression(path, first_bytes(file, path)):
            yield from _decompressed_lines(file, compression, path)
            return
        while offset < stop:
            line = file.readline(DOCUMENT_BYTES + 1)
            if not line:
                return
            if len(line) > DOCUMENT_BYTES:
                raise _too_long(path, LineNumbers().at(path, size_bytes, offset), offset)
            yield offset, line
            offset += len(line)


class LineNumbers:
    """Counts the lines before an offset, and continues from the last count in the same file."""

    def __init__(self) -> None:
        self._counted: dict[str, tuple[int, int]] = {}

    def at(self, path: str, size_bytes: int, offset: int) -> int:
        """Returns the number (from 1) of the line that starts at `offset` of a plain file."""
        start, number = self._counted.get(path, (0, 1))
        if offset < start:
            start, number = 0, 1
        with opened(path, size_bytes) as file:
            file.seek(start)
            while start < offset:
                chunk = file.read(min(_BUFFER_BYTES, offset - start))
                assert chunk, f"{path} ends before {offset}"
                number += chunk.count(b"\n")
                start += len(chunk)
        self._counted[path] = (offset, number)
        return number


def _decompressed(file: BinaryIO, compression: str, path: str) -> Iterator[bytes]:
    """Yields the decompressed contents in chunks; refuses an archive that was compressed."""
    chunks = decompressed(file, compression, path)
    if first := next(chunks, b""):
        file_kind.refuse_stand_in(f"The decompressed {path}", first)
        yield first
    yield from chunks


def _decompressed_lines(file: BinaryIO, compression: str, path: str) -> Iterator[tuple[int, bytes]]:
    offset, number = 0, 1
    chunks = ChunkedFile(_decompressed(file, compression, path))
    try:
        buffered = io.BufferedReader(chunks, _BUFFER_BYTES)
        while line := buffered.readline(DOCUMENT_BYTES + 1):
            if len(line) > DOCUMENT_BYTES:
                raise _too_long(path, number, offset)
            yield offset, line
            offset += len(line)
            number += 1
    except DamageError as damage:
        raise _lost(path, number, offset, damage) from damage


def _lost(path: str, line: int, offset: int, damage: DamageError) -> BadLineError:
    bad = BadLine(path, line, offset, f"the file is {damage}")
    return BadLineError(
        f"{bad}. The rest of the file cannot be read, and --on_bad_line=skip leaves out only "
        "single lines; download the file again, or exclude it from the pattern."
    )


def _too_long(path: str, line: int, offset: int) -> BadLineError:
    bad = BadLine(
        path, line, offset, f"the document that begins here has more than {DOCUMENT_BYTES:,} bytes"
    )
    return BadLineError(
        f"{bad}. It could fill the memory; divide the document, or exclude the file from the "
        "pattern."
    )
