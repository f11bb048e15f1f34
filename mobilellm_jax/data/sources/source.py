"""The interface of a source of documents, and the types of its pieces and bad lines."""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from mobilellm_jax import config
from mobilellm_jax.data.sources.finding import File
from mobilellm_jax.errors import UserError

TRAIN = "train"
VALIDATION = "validation"

# Bytes of text in a piece. One core tokenizes this much text in about a second. A single document
# may be longer.
PIECE_BYTES = 8_000_000


class Document(NamedTuple):
    """The text of a document, and the `name` by which messages tell where the text comes from.

    `held_out` says whether the document is for validation; None leaves this to its digest.
    """

    name: str
    text: str
    held_out: bool | None = None


class TokenDocument(NamedTuple):
    """A document of token ids; `loss_mask` has a 0 or 1 per token, and None means all ones."""

    name: str
    ids: Sequence[int]
    loss_mask: Sequence[int] | None


@dataclass(frozen=True)
class Piece:
    """A section of a source, which one worker reads and encodes as one task.

    The `size_bytes` of all pieces add up to the stored size of the corpus. `where` tells the source
    which section to read. Its values are tuples (lists in JSON), strings and numbers.
    """

    spec: str
    split: str
    size_bytes: int
    where: tuple[Any, ...]


@dataclass(frozen=True)
class BadLine:
    """The reason why a line of a text file, or a record of another file, is not a document.

    `line` is the number of the line or record, counted from 1. `byte_offset` is the position of the
    fault in the file, or in the decompressed text of a compressed file. It is None for a record.
    """

    file: str
    line: int
    byte_offset: int | None
    reason: str

    def __str__(self) -> str:
        if self.byte_offset is None:
            return f"{self.file}, record {self.line}: {self.reason}"
        return f"{self.file}, line {self.line}, byte {self.byte_offset}: {self.reason}"


class BadLineError(UserError):
    """A line, or the rest of a file, cannot be read."""


OnBadLine = Callable[[BadLine], None]


def stop(bad: BadLine) -> NoReturn:
    """Raises an error for a bad line; used as `on_bad` by commands that do not skip bad lines."""
    raise BadLineError(
        f"{bad}. Correct it, or leave such lines out with --on_bad_line=skip, which counts them."
    )


def decoded_record(
    file: str, record: int, field: str, content: bytes, on_bad: OnBadLine
) -> Iterator[Document]:
    """Yields the document of a record, or calls `on_bad` if `content` is not UTF-8."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = (
            f"byte {content[error.start]:#04x} at {error.start} of {field} is not UTF-8 "
            f"({error.reason})"
        )
        on_bad(BadLine(file, record, None, reason))
    else:
        yield Document(f"{file}, record {record}", text)


def field_error(
    spec: str, noun: str, field: str, types: Mapping[str, str], texts: Sequence[str], place: str
) -> UserError:
    """Returns the error for a `field` that is not in `types`, or is not one of the text fields."""
    problem = (
        f"{noun} {field!r} is {types[field]}, not text"
        if field in types
        else f"there is no {noun} {field!r}"
    )
    return UserError(
        f"source={spec!r}: {problem}{place}. Name a text {noun} with #FIELD; text {noun}s: "
        f"{', '.join(texts) or 'none'}.{config.near_miss(field, texts)}"
    )


class Source(abc.ABC):
    """A source of documents in a fixed order; `spec` is the user's text that names the source.

    A process uses one object for all pieces, because the object caches what it has opened and
    counted.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec

    @abc.abstractmethod
    def identity(self) -> str:
        """Returns a line of text that changes when the documents change.

        The method does not read the documents. For files, the line depends on the names, sizes and
        stamps of the files.
        """

    def files(self) -> Sequence[File]:
        """Returns the files that the user may change; other sources have none."""
        return ()

    @abc.abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Returns the splits that the source has: train, and validation if the source has it."""

    @abc.abstractmethod
    def pieces(self, split: str) -> list[Piece]:
        """Returns the pieces of a split in order; equal documents always give equal pieces."""

    @abc.abstractmethod
    def documents(self, piece: Piece, on_bad: OnBadLine) -> Iterator[Document | TokenDocument]:
        """Yields the documents of a piece in order, including empty documents.

        Any process may call this method after it has opened the source from `spec`. The method
        calls `on_bad` for every line or record that is not a document. If `on_bad` raises, reading
        ends. If `on_bad` returns, the line is left out.

        Raises:
          BadLineError: if a compressed file is truncated or damaged, whatever `on_bad` does,
            because more than a line is lost.
          UserError: if a file has changed since the piece was listed.
        """
