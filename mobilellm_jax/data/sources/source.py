"""The interface of a source of documents: pieces, documents and bad lines."""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from mobilellm_jax.errors import UserError

TRAIN = "train"
VALIDATION = "validation"

# Bytes of text in a piece, which one core tokenizes in about a second. One document may be longer.
PIECE_BYTES = 8_000_000


class Document(NamedTuple):
    """A text; `name` tells in messages where the text comes from."""

    name: str
    text: str


class TokenDocument(NamedTuple):
    """A document of token ids; `loss_mask` has a 0 or 1 per token, None means all ones."""

    name: str
    ids: Sequence[int]
    loss_mask: Sequence[int] | None


@dataclass(frozen=True)
class Piece:
    """A part of a source that a worker can read alone as its next task.

    The `size_bytes` of all pieces add up to the stored size of the corpus. `where` tells the source
    which part it is. It consists of tuples (lists in JSON), text and numbers.
    """

    spec: str
    split: str
    size_bytes: int
    where: tuple[Any, ...]


@dataclass(frozen=True)
class BadLine:
    """The fault of a line in a file of lines, or of a record in another file.

    Lines and records count from 1. `byte_offset` is the place of the fault in the file, or in the
    decompressed text of a compressed file. Records have no offset.
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
    """Refuses a bad line; commands that do not skip bad lines use it as `on_bad`."""
    raise BadLineError(
        f"{bad}. Correct it, or leave such lines out with --on_bad_line=skip, which counts them."
    )


def decoded_record(
    file: str, record: int, field: str, content: bytes, on_bad: OnBadLine
) -> Iterator[Document]:
    """Yields the text of a record, or calls `on_bad` if the bytes of `field` are not UTF-8."""
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


class Source(abc.ABC):
    """Documents in a fixed order, in pieces; `spec` is the text that named the source.

    A process uses one object for all pieces, because the object keeps opened files and counts.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec

    @abc.abstractmethod
    def identity(self) -> str:
        """Returns a line that changes when the documents change, without reading them.

        For files, the line depends on names, sizes and times.
        """

    @abc.abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Returns the source's own splits: train, and validation if it has one."""

    @abc.abstractmethod
    def pieces(self, split: str) -> list[Piece]:
        """Returns the pieces of a split in order, always the same for the same documents."""

    @abc.abstractmethod
    def documents(self, piece: Piece, on_bad: OnBadLine) -> Iterator[Document | TokenDocument]:
        """Yields the documents of a piece in order, also empty ones.

        Any process may do this with a source that it opened from `spec`. `on_bad` is called for
        every line or record that is not a document. If it raises, reading ends. If it returns, the
        line is left out.

        Raises:
          BadLineError: if a compressed file is truncated or damaged, whatever `on_bad` does,
            because more than a line is lost.
          UserError: if a file has changed since the piece was listed.
        """
