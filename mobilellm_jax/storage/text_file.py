r"""Reads text that the user gives: whole files, and files or standard input line by line.

A text is UTF-8. A byte order mark at the start says only how the text is stored, so it is not part
of the text. Lines end with "\n" or "\r\n"; a lone "\r" is a character like any other, and so is
U+2028, at which `str.splitlines` would divide a line.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import decompression, file_kind

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_text(flag: str, file: Path) -> str:
    """Returns the text of a file with unchanged line ends; raises if the file has no text.

    The file may be compressed, and it may be a pipe. `flag` names the file in messages.
    """
    what = f"{flag}={file}"
    text = _decoded(_contents(what, file), what)
    if not text:
        raise UserError(f"{what} is empty; name a file with text.")
    return text


def read_lines(flag: str, file: Path) -> list[str]:
    """Returns the lines of a file without their ends; raises if the file has no text."""
    lines = read_text(flag, file).removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines]


def decoded_lines(lines: Iterable[bytes], what: str) -> Iterator[str]:
    """Yields the lines of an open file, such as `sys.stdin.buffer`, without their ends.

    `what` names the file in messages. A line is yielded as soon as it has been read.
    """
    for number, line in enumerate(lines, start=1):
        text = _decoded(line, f"{what}, line {number}," if number > 1 else what, number == 1)
        yield text.removesuffix("\n").removesuffix("\r")


def _contents(what: str, file: Path) -> bytes:
    file_kind.check_is_file(what, file, "a text file in UTF-8")
    with file.open("rb") as opened:
        content = opened.read()
    first = content[: file_kind.FIRST_BYTES]
    compression = file_kind.compression(file.name, first)
    if compression is None:
        return content
    chunks = decompression.decompressed(io.BytesIO(content), compression, what)
    try:
        return b"".join(chunks)
    except decompression.DamageError as damage:
        raise UserError(f"{what} is {damage}; fetch the file again.") from damage


def _decoded(content: bytes, what: str, at_start: bool = True) -> str:
    start = len(_BYTE_ORDER_MARK) if at_start and content.startswith(_BYTE_ORDER_MARK) else 0
    try:
        return content[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = file_kind.explanation(content[: file_kind.FIRST_BYTES]) or (
            "; convert the file, for example with iconv"
        )
        raise UserError(
            f"{what} must be UTF-8, but byte {start + error.start} is "
            f"0x{error.object[error.start]:02x}{remedy}."
        ) from error
