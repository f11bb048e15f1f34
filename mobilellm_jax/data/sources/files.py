"""Finds, opens and reads the files of a corpus, on this machine or at a URL."""

import abc
import contextlib
import functools
import glob
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from mobilellm_jax.data.sources import source
from mobilellm_jax.data.sources.decompression import ChunkedFile, DamageError, decompressed
from mobilellm_jax.data.sources.source import TRAIN, BadLine, BadLineError, Piece, Source
from mobilellm_jax.errors import MissingFileError, UserError, require

COMPRESSED = (".gz", ".zst")

_BUFFER_BYTES = 1 << 20
DOCUMENT_BYTES = 1 << 28
"""Largest size in bytes of a line, or of a file that is one document.

This limit protects the memory: a few compressed kilobytes can expand to terabytes, and tokenizing a
tenth of this size already takes gigabytes.
"""
# Fields of fsspec that change when a file is written again. Each storage system provides some of
# these fields.
_STAMPS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")


@dataclass(frozen=True)
class File:
    """A file that `find` has found; `stamp` changes when the file is written again."""

    path: str
    size_bytes: int
    stamp: str


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


def find(spec: str, pattern: str) -> list[File]:
    """Returns the files that match, sorted by path; leaves out folders and hidden local files.

    Raises:
      MissingFileError: if no file matches.
      UserError: if fsspec cannot open the URL.
    """
    if "://" in pattern:
        filesystem, path = _filesystem(pattern, f"source={spec!r}")
        try:
            found = filesystem.glob(path, detail=True)
        except FileNotFoundError:  # Some storage systems raise this for a folder or a bucket.
            found = {}
        files = [
            File(
                filesystem.unstrip_protocol(name),
                _size(spec, name, info),
                " ".join(f"{key}={info[key]}" for key in _STAMPS if key in info),
            )
            for name, info in sorted(found.items())
            if info["type"] != "directory"
        ]
    else:
        found = sorted(glob.glob(pattern, recursive=True))
        files = []
        for path in filter(os.path.isfile, found):
            status = os.stat(path)
            files.append(File(path, status.st_size, str(status.st_mtime_ns)))
    if not files:
        what = "folders only; add /**/*.txt or the like" if found else "nothing"
        raise MissingFileError(f"source={spec!r}: the pattern matches {what}.")
    return files


def identity(kind: str, files: list[File]) -> str:
    """Returns a line of text that changes when the name, size or stamp of a file changes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr((file.path, file.size_bytes, file.stamp)).encode())
    total = sum(file.size_bytes for file in files)
    return (
        f"{kind}, {len(files)} files, {total} bytes, "
        f"SHA-256 of names, sizes and times {digest.hexdigest()}"
    )


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
        filesystem, inner = _filesystem(path, path)
        buffered: BinaryIO = io.BufferedReader(filesystem.open(inner, "rb"), _BUFFER_BYTES)
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


def contents(path: str, size_bytes: int) -> bytes:
    """Returns the whole contents of a file, decompressed if the file is compressed.

    Raises:
      BadLineError: if a compressed file is truncated or damaged, or the contents are too long.
    """
    with opened(path, size_bytes) as file:
        if not path.endswith(COMPRESSED):
            if size_bytes > DOCUMENT_BYTES:
                raise _too_long(path, 1, 0)
            return file.read()
        content = io.BytesIO()
        try:
            for chunk in decompressed(file, path):
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
        if path.endswith(COMPRESSED):
            yield from _decompressed_lines(file, path)
            return
        offset = start
        if start:
            # The line that contains the byte before `start` belongs to an earlier piece, so it is
            # skipped.
            file.seek(start - 1)
            offset -= 1
            while True:
                rest = file.readline(_BUFFER_BYTES)
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
                if not rest or offset >= stop:
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


def _decompressed_lines(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    offset, number = 0, 1
    chunks = ChunkedFile(decompressed(file, path))
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


def _filesystem(url: str, culprit: str) -> tuple[Any, str]:
    """Returns fsspec's file system for the URL, and the path within this file system."""
    require("fsspec", "data", culprit)
    import fsspec

    if "::" in url:
        raise UserError(f"{culprit}: chained URLs (a::b) are not supported; give a single URL.")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{culprit}: {error}, e.g. with pip.") from error
    except ValueError as error:
        raise UserError(
            f"{culprit}: {error}; fsspec knows the protocols "
            f"{', '.join(sorted(fsspec.available_protocols()))}."
        ) from error
    return filesystem, path


def _size(spec: str, name: str, info: dict[str, Any]) -> int:
    if info["size"] is None:
        raise UserError(
            f"source={spec!r}: the server does not tell the size of {name}; download the file and "
            "name the local copy."
        )
    return int(info["size"])
