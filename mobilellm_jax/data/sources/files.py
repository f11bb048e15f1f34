"""Finds, opens and reads the files of a corpus, on this machine or behind a URL."""

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
"""Largest line, and largest compressed file that is one document, in bytes.

A few kilobytes can expand to terabytes. Tokenizing a tenth of this size already takes gigabytes.
"""
# Fields of fsspec that change when a file is written again; each store has some of them.
_STAMPS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")


@dataclass(frozen=True)
class File:
    """A file as it was found; `stamp` changes when the file is written again."""

    path: str
    size_bytes: int
    stamp: str


class Part(NamedTuple):
    """The share of a file in a piece: `where`, the bytes of text, and the bytes of the file."""

    where: tuple[Any, ...]
    text_bytes: int
    stored_bytes: int


class FileSource(Source):
    """Files that match a pattern; they have no splits of their own."""

    def __init__(self, spec: str, pattern: str) -> None:
        super().__init__(spec)
        self._pattern = pattern

    def splits(self) -> tuple[str, ...]:
        return (TRAIN,)

    def identity(self) -> str:
        return identity(self.spec, self._files)

    def pieces(self, split: str) -> list[Piece]:
        assert split == TRAIN, f"{self.spec} has no split {split}"
        return pack(self.spec, self._parts())

    @abc.abstractmethod
    def _parts(self) -> Iterable[Part]:
        """Returns the files in order, or the ranges of them that can be read separately."""

    @functools.cached_property
    def _files(self) -> list[File]:
        return find(self.spec, self._pattern)


def find(spec: str, pattern: str) -> list[File]:
    """Returns the files that match, ordered by path, without folders and hidden local files.

    Raises:
      MissingFileError: if no file matches.
      UserError: if fsspec cannot open the URL.
    """
    if "://" in pattern:
        filesystem, path = _filesystem(pattern, f"source={spec!r}")
        try:
            found = filesystem.glob(path, detail=True)
        except FileNotFoundError:  # some stores return this for a folder or a bucket
            found = {}
        files = [
            File(filesystem.unstrip_protocol(name), _size(spec, name, info), _stamp(info))
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
    """Returns a line that changes with the names, sizes and times of the files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr((file.path, file.size_bytes, file.stamp)).encode())
    total = sum(file.size_bytes for file in files)
    return (
        f"{kind}, {len(files)} files, {total} bytes, "
        f"SHA-256 of names, sizes and times {digest.hexdigest()}"
    )


def pack(spec: str, parts: Iterable[Part]) -> list[Piece]:
    """Returns pieces of `parts` in order; a piece holds about `PIECE_BYTES` of text."""
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
    """Yields `count` nearly equal ranges (start, stop) that cover 0 to `total` without gaps."""
    for i in range(count):
        yield i * total // count, (i + 1) * total // count


@contextlib.contextmanager
def opened(path: str, size_bytes: int) -> Iterator[BinaryIO]:
    """Opens a file as it is stored, or raises a UserError if it no longer has `size_bytes`."""
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
    """Returns the whole file, decompressed.

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
    r"""Yields (offset, line) for the lines that start in [start, stop), with their "\n".

    The last line of a file may lack it. A compressed file is yielded whole, with offsets in the
    decompressed text. Memory holds one line, and not the file.

    Raises:
      BadLineError: if a compressed file is truncated or damaged, or a line is too long.
    """
    with opened(path, size_bytes) as file:
        if path.endswith(COMPRESSED):
            yield from _decompressed_lines(file, path)
            return
        offset = start
        if start:
            # The line that contains the byte before `start` belongs to an earlier piece.
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
    """Counts the lines before an offset; in each file, it continues from its last count."""

    def __init__(self) -> None:
        self._counted: dict[str, tuple[int, int]] = {}

    def at(self, path: str, size_bytes: int, offset: int) -> int:
        """Returns the number, from 1, of the line that starts at `offset` of a plain file."""
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
    """Returns fsspec's file system for the URL, and the path in it."""
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


def _stamp(info: dict[str, Any]) -> str:
    return " ".join(f"{key}={info[key]}" for key in _STAMPS if key in info)
