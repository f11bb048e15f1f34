"""Where documents come from, and how a corpus is divided into pieces that any process can read.

    python_docs                 the text that ships with Python
    tfds:NAME[:SPLIT][#FIELD]   a TensorFlow dataset, read without TensorFlow
    text:GLOB                   files; each is a document
    jsonl:GLOB[#FIELD]          files of JSON objects, one a line
    parquet:GLOB[#FIELD]        tables; each row is a document
    tokens:GLOB                 jsonl of token ids: {"token_ids": [...], "loss_mask": [...]}

FIELD is the feature, key or column that holds the text, "text" if it is not named; it begins behind
the last #, so that a pattern with a # of its own must name it. GLOB is a local pattern, whose `**`
matches folders of any depth, or a URL that fsspec knows (s3://, gs://, file://). Files of text,
jsonl and tokens may end in .gz or .zst.

A worker that reads one piece starts in milliseconds: what a kind of source needs (TFDS, PyArrow,
fsspec, zstandard) is imported where it is used.
"""

import abc
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mobilellm_jax import config

TRAIN = "train"
VALIDATION = "validation"

# Of text, in a piece; about a second of tokenising on one core. One document may be longer.
PIECE_BYTES = 8_000_000

_FORMS = (
    "python_docs",
    "tfds:NAME[:SPLIT][#FIELD]",
    "text:GLOB",
    "jsonl:GLOB[#FIELD]",
    "parquet:GLOB[#FIELD]",
    "tokens:GLOB",
)
_FIELD = "text"
_WITH_FIELD = re.compile(r"(?P<name>[^#](?:.*?[^#])?)(?:#(?P<field>[^#]+))?")
# A version belongs to the name: tfds:lm1b:1.1.0:train[:10%].
_TFDS = re.compile(
    r"(?P<name>[^:#]+(?::\d+\.[\d*]+\.[\d*]+)?)(?::(?P<split>[^#]+))?(?:#(?P<field>.+))?"
)


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


class BadLineError(ValueError):
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
          ValueError: for a file that has changed since the piece was listed.
        """


def open_source(spec: str, scratch: Path) -> Source:
    """Returns the source that `spec` names; what it must build for itself goes under `scratch`.

    Processes that share a source share `scratch` too, and the first one asks for its pieces before
    the others start.

    Raises:
      ValueError: for an unknown form.
    """
    # Here, because they are made of the classes above.
    from mobilellm_jax.data import line_sources, parquet_source, tfds_sources

    scheme, _, rest = spec.partition(":")
    if spec == "python_docs":
        return tfds_sources.PythonDocsSource(spec, scratch)
    if scheme == "tfds" and (match := _TFDS.fullmatch(rest)):
        return tfds_sources.TfdsSource(
            spec, match["name"], match["split"], match["field"] or _FIELD
        )
    if scheme == "text" and rest:
        return line_sources.TextSource(spec, rest)
    if scheme == "tokens" and rest:
        return line_sources.TokensSource(spec, rest)
    if scheme in ("jsonl", "parquet") and (match := _WITH_FIELD.fullmatch(rest)):
        field = match["field"] or _FIELD
        if scheme == "jsonl":
            return line_sources.JsonlSource(spec, match["name"], field)
        return parquet_source.ParquetSource(spec, match["name"], field)
    forms = {form.partition(":")[0]: form for form in _FORMS}
    if scheme in forms:
        rule = f"must have the form {forms[scheme]}"
    else:
        rule = f"must be one of {', '.join(_FORMS)}"
    hint = "" if scheme in forms else config.near_miss(scheme, forms)
    raise ValueError(f"source={spec!r} {rule}.{hint}")
