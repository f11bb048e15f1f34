"""Escapes text for a terminal, so that no character moves the cursor or reverses the text."""

import unicodedata
from collections.abc import Iterable, Iterator

_NEWLINE = r"\n"


def escaped(text: str, also: str = "") -> Iterator[str]:
    r"""Yields the characters of `text`, and escapes some of them as Python does: \n, \x1b, \u202e.

    The function escapes control and format characters, separators except the space, unassigned
    characters, the backslash, and the characters of `also`.
    """
    for character in text:
        if character == "\\" or character in also or not character.isprintable():
            yield character.encode("unicode_escape").decode("ascii")
        else:
            yield character


def wrapped(parts: Iterable[str], columns: int) -> Iterator[str]:
    """Joins parts into lines of at most `columns` columns; an escaped newline also ends a line."""
    line, width = "", 0
    for part in parts:
        added = sum(map(_columns, part))
        if line and width + added > columns:
            yield line
            line, width = "", 0
        line, width = line + part, width + added
        if part == _NEWLINE:
            yield line
            line, width = "", 0
    if line:
        yield line


def _columns(character: str) -> int:
    """Returns how many terminal columns a character takes; an upper bound for joined emoji."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
