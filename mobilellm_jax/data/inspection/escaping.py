"""Escapes text for a terminal, so that nothing in it moves the cursor or reverses the writing."""

import unicodedata
from collections.abc import Iterable, Iterator

_NEWLINE = r"\n"


def escaped(text: str, also: str = "") -> Iterator[str]:
    r"""Yields the characters of `text`, some of them escaped as Python does: \n, \x1b, \u202e, \\.

    Escaped are control and format characters, separators except the space, unassigned characters,
    the backslash, and the characters of `also`.
    """
    for character in text:
        if character == "\\" or character in also or not character.isprintable():
            yield character.encode("unicode_escape").decode("ascii")
        else:
            yield character


def wrapped(parts: Iterable[str], columns: int) -> Iterator[str]:
    """Yields whole parts in lines of at most `columns`; an escaped newline also ends a line."""
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
    """Returns a character's columns on a terminal; for joined emoji, an upper bound."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
