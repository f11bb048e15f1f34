"""What a source of documents is: pieces that any process can read, documents, bad lines."""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from mobilellm_jax.errors import UserError

TRAIN = "train"
VALIDATION = "validation"

# Of text, in a piece; about a second of tokenising on one core. One document may be longer.
PIECE_BYTES = 8_000_000


class Document(NamedTuple):
    """`name` says in messages where the text is from."""

    name: str
    text: str


class TokenDocument(NamedTuple):
    """A document that is tokens already; `loss_mask` has a 0 or 1 for each, None = all ones."""

    name: str
    ids: Sequence[int]
    loss_mask: Sequence[int] | None


@dataclass(frozen=True)
class Piece:
    """A part of a source that can be read alone, small enough to be one worker's next task.

    `size_bytes` adds up over the pieces to the size of the corpus as it is stored. `where` is for
    the source that made it; it consists of tuples (or lists, as JSON has them), text and numbers.
    """

    spec: str
    split: str
    size_bytes: int
    where: tuple[Any, ...]


@dataclass(frozen=True)
class BadLine:
    """What is wrong with a line, of a file of lines, or with a record, of anything else.

    Lines and records count from 1. `byte_offset` is where the fault is, in the file or, if that is
    compressed, in its decompressed text; records have none.
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
    """Refuses a bad line; the `on_bad` of whoever does not skip them."""
    raise BadLineError(
        f"{bad}. Correct it, or leave such lines out with --on_bad_line=skip, which counts them."
    )


class Source(abc.ABC):
    """Documents in a fixed order, in pieces; `spec` is the text that named the source.

    One object serves one process: keep it for all the pieces that the process reads, so that what
    it opened and counted once need not be opened and counted again.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec

    @abc.abstractmethod
    def identity(self) -> str:
        """Returns a line that changes when the documents do, without reading them.

        Of files that is their names, sizes and times.
        """

    @abc.abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Returns the splits that the source itself has: train, and perhaps validation."""

    @abc.abstractmethod
    def pieces(self, split: str) -> list[Piece]:
        """Returns the pieces of a split in order, always the same for the same documents."""

    @abc.abstractmethod
    def documents(self, piece: Piece, on_bad: OnBadLine) -> Iterator[Document | TokenDocument]:
        """Yields the documents of a piece in order, the empty ones too.

        Any process may do this with the source that it opened itself from `spec`. `on_bad` is
        called for every line or record that is no document: raising ends the reading, returning
        leaves the line out.

        Raises:
          BadLineError: for a compressed file that is cut off or damaged, whatever `on_bad` does:
            what is lost is more than a line.
          UserError: for a file that has changed since the piece was listed.
        """
