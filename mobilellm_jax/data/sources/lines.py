"""Sources of text files: a document is a file of `text`, or a line of `jsonl` or `tokens`."""

import abc
import json
from collections.abc import Iterator
from typing import Any

from mobilellm_jax import config
from mobilellm_jax.data.sources import files, source
from mobilellm_jax.data.sources.source import (
    BadLine,
    Document,
    OnBadLine,
    Piece,
    TokenDocument,
)
from mobilellm_jax.storage import file_kind

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN_FIELDS = 10
_SHOWN_CHARACTERS = 100
_JSON_TYPES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


class _Fault(Exception):  # noqa: N818  # Only this module uses it.
    """The reason why a file or line is not a document; the fault is at byte `at`."""

    def __init__(self, reason: str, at: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at


class TextSource(files.FileSource):
    """A source in which every file is a document, in the order of the paths.

    A whole file is in memory, because it is one document. The text keeps the byte order mark and
    the line ends of the file, so decoding the tokens gives the file again, byte for byte.
    """

    def documents(self, piece: Piece, on_bad: OnBadLine) -> Iterator[Document]:
        for path, size in piece.where:
            content = files.contents(path, size)
            try:
                text = _decoded(content)
            except _Fault as fault:
                line = content.count(b"\n", 0, fault.at) + 1
                on_bad(BadLine(path, line, fault.at, fault.reason))
                continue
            yield Document(path, text)

    @property
    def _parts(self) -> Iterator[files.Part]:
        for file in self._checked_files:
            yield files.Part((file.path, file.size_bytes), file.size_bytes, file.size_bytes)


class _LineSource(files.FileSource):
    """A source in which every line of a file is a document; blank lines are skipped.

    Several pieces may share a plain file, and a line belongs to the piece in which it starts. A
    compressed file is never divided, because decompression must begin at its first byte. A byte
    order mark at the start of a file is not part of the first line.
    """

    def __init__(self, spec: str, pattern: str) -> None:
        super().__init__(spec, pattern)
        self._numbers = files.LineNumbers()

    def documents(self, piece: Piece, on_bad: OnBadLine) -> Iterator[Document | TokenDocument]:
        for path, size, start, stop in piece.where:
            for index, (offset, line) in enumerate(files.lines(path, size, start, stop)):
                if not offset and line.startswith(_BYTE_ORDER_MARK):
                    offset = len(_BYTE_ORDER_MARK)
                    line = line[offset:]
                if line.isspace() or not line:
                    continue
                try:
                    document = self._document(f"{path}, byte {offset}", line)
                except _Fault as fault:
                    # The line number is computed only for a fault, because all earlier lines must
                    # be counted.
                    number = index + 1 if not start else self._numbers.at(path, size, offset)
                    on_bad(BadLine(path, number, offset + fault.at, fault.reason))
                    continue
                yield document

    @abc.abstractmethod
    def _document(self, name: str, line: bytes) -> Document | TokenDocument:
        """Returns the document of a line, or raises a `_Fault` if the line is not a document."""

    @property
    def _parts(self) -> Iterator[files.Part]:
        for file in self._checked_files:
            size = file.size_bytes
            count = -(-size // source.PIECE_BYTES)
            whole = count != 1 and files.is_compressed(file)
            for start, stop in files.cuts(size, 1 if whole else count):
                yield files.Part((file.path, size, start, stop), stop - start, stop - start)


class JsonlSource(_LineSource):
    """A source of JSON objects, one per line; the field `field` is the text of a document."""

    def __init__(self, spec: str, pattern: str, field: str) -> None:
        super().__init__(spec, pattern)
        self._field = field

    def _document(self, name: str, line: bytes) -> Document:
        record = _json_object(line)
        try:
            text = record[self._field]
        except KeyError:
            raise _Fault(_missing(self._field, record) + "; name another with #FIELD") from None
        if not isinstance(text, str):
            raise _Fault(f"field {self._field!r} is {_JSON_TYPES[type(text)]}, not a string")
        if b"\\u" in line and not text.isascii():
            _check_characters(text)
        return Document(name, text)


class TokensSource(_LineSource):
    """Every line is {"token_ids": [...]}, with an optional "loss_mask": a 0 or 1 for each id.

    The ids must come from the tokenizer that `prepare` uses. `prepare` adds BOS and EOS where they
    are missing. Other fields are ignored.
    """

    def _document(self, name: str, line: bytes) -> TokenDocument:
        record = _json_object(line)
        if "token_ids" not in record:
            raise _Fault(_missing("token_ids", record))
        ids = _whole_numbers(record, "token_ids", range(1 << 63), "0 or more")
        loss_mask = None
        if "loss_mask" in record:
            loss_mask = _whole_numbers(record, "loss_mask", range(2), "0 or 1")
            if len(loss_mask) != len(ids):
                raise _Fault(
                    f"loss_mask has {len(loss_mask)} entries for {len(ids)} token_ids; it must "
                    "have one for each"
                )
        return TokenDocument(name, ids, loss_mask)


def _json_object(line: bytes) -> dict[str, Any]:
    text = _decoded(line)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        at = min(error.pos, len(text.rstrip()))  # The position must be in the line.
        kind = file_kind.explanation(line[: file_kind.FIRST_BYTES])
        reason = f"is not JSON ({error.msg} at character {at + 1}){kind}"
        raise _Fault(reason, len(text[:at].encode())) from error
    # A number with thousands of digits raises ValueError, and deep nesting raises RecursionError.
    except (ValueError, RecursionError) as error:
        raise _Fault(f"is not JSON that can be read ({error})") from error
    if not isinstance(record, dict):
        raise _Fault(f"is {_JSON_TYPES[type(record)]}, not an object")
    return record


def _missing(field: str, record: dict[str, Any]) -> str:
    names = list(record)
    shown = ", ".join(names[:_SHOWN_FIELDS]) or "none at all"
    more = ", ..." if len(names) > _SHOWN_FIELDS else ""
    return f"has no field {field!r}, only {shown}{more}{config.near_miss(field, names)}"


def _whole_numbers(record: dict[str, Any], field: str, allowed: range, rule: str) -> list[int]:
    values = record[field]
    if not isinstance(values, list):
        raise _Fault(f"field {field!r} is {_JSON_TYPES[type(values)]}, not an array")
    # This line checks all types at once, because a loop over the numbers would take ten times as
    # long. A boolean is not a number here.
    if values and not (
        {*map(type, values)} == {int} and min(values) in allowed and max(values) in allowed
    ):
        index = next(i for i, v in enumerate(values) if type(v) is not int or v not in allowed)
        shown = json.dumps(values[index])[:_SHOWN_CHARACTERS]
        raise _Fault(f"{field}[{index}] is {shown}; it must be a whole number, {rule}")
    return values


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Fault(
            f"byte {content[error.start]:#04x} is not UTF-8 ({error.reason})"
            + (
                file_kind.explanation(content[: file_kind.FIRST_BYTES])
                or "; convert the file to UTF-8, e.g. with iconv"
            ),
            error.start,
        ) from error


def _check_characters(text: str) -> None:
    r"""Raises a `_Fault` for a lone surrogate, which JSON can write (\ud800) and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Fault(
            f"character {error.start + 1} of the text is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}), not a character"
        ) from error
