"""Recognises by its first bytes whether a user's file is what the user believes it to be.

A name proves nothing: a download may be compressed without saying so, and a clone without its large
files has small pointers under the right names.
"""

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from mobilellm_jax.errors import MissingFileError, UserError

FIRST_BYTES = 512
"""Number of bytes at the start of a file that this module needs."""

_COMPRESSED = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    # A zstd file may begin with a skippable frame; pzstd writes such files.
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL),
}
_ENDINGS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
# The start of a compressed file that was cut off can look like a text of a few bytes.
_SHORTEST_TEXT = 16


class Kind(NamedTuple):
    """A kind of file that cannot be read as it is; `name` has an article, `remedy` is a clause."""

    name: str
    remedy: str


_STAND_INS = {
    re.compile(rb"version https://git-lfs\.github\.com/spec/"): Kind(
        "a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"
    ),
    re.compile(rb"/annex/objects/"): Kind(
        "a git-annex pointer, not the file itself", "fetch the file with `git annex get`"
    ),
    re.compile(rb".{257}ustar", re.DOTALL): Kind(
        "a tar archive", "unpack it with `tar -xf` and name the files in it"
    ),
}
# A text file may begin with the same bytes as one of these kinds. So a message proposes such a kind
# only after the file could not be read.
_OTHERS = {
    re.compile(rb"PK\x03\x04"): Kind("a zip archive", "unpack it and name the files in it"),
    re.compile(rb"7z\xbc\xaf\x27\x1c"): Kind("a 7z archive", "unpack it and name the files in it"),
    re.compile(rb"Rar!\x1a\x07"): Kind("a RAR archive", "unpack it and name the files in it"),
    re.compile(rb"\x04\x22\x4d\x18"): Kind("an lz4 file", "decompress it with `lz4 -d`"),
    re.compile(rb"\x1f\x9d"): Kind("a file of `compress`", "decompress it with `gzip -d`"),
    re.compile(rb"PAR1"): Kind("a Parquet file", "a source of such files is parquet:GLOB"),
    re.compile(rb"ARROW1"): Kind("an Arrow file", "write it as Parquet or as JSON lines"),
    re.compile(rb".{4}\0{4}\{", re.DOTALL): Kind(
        "a safetensors file", "give it a name that ends in .safetensors"
    ),
    re.compile(rb"%PDF-"): Kind("a PDF", "convert it to text, for example with `pdftotext`"),
    re.compile(rb"\xff\xfe|\xfe\xff"): Kind(
        "UTF-16 text", "convert it with `iconv -f UTF-16 -t UTF-8`"
    ),
    re.compile(rb"\s*<(?:!doctype html|html)", re.IGNORECASE): Kind(
        "a web page", "download the file itself; the page may say why it was sent instead"
    ),
    **{
        pattern: Kind(f"a file that {name} compressed", "decompress it first")
        for name, pattern in _COMPRESSED.items()
    },
}


def compression(name: str, first: bytes) -> str | None:
    """Returns the format that decompresses a file, or None for a file that is not compressed.

    Args:
      name: name of the file; its ending is used only if the first bytes show no known format.
      first: the first `FIRST_BYTES` bytes of the file, or all its bytes.
    """
    for format_, pattern in _COMPRESSED.items():
        if pattern.match(first):
            return format_
    named = _ENDINGS.get(os.path.splitext(name)[1])
    if named and len(first) >= _SHORTEST_TEXT and _is_text(first):
        return None  # Some programs decompress a download and keep the ending of the name.
    return named


def stand_in(first: bytes) -> Kind | None:
    """Returns the kind of a pointer or an archive, whose bytes must never be taken for contents."""
    return _first_match(_STAND_INS, first)


def refuse_stand_in(name: object, first: bytes) -> None:
    """Raises a UserError that names the file if it is a pointer or an archive."""
    if found := stand_in(first):
        raise UserError(f"{name} is {found.name}; {found.remedy}.")


def explanation(first: bytes) -> str:
    """Returns "; it looks like KIND: REMEDY" for what could not be read, or an empty text."""
    found = _first_match({**_STAND_INS, **_OTHERS}, first)
    return f"; it looks like {found.name}: {found.remedy}" if found else ""


def first_bytes(file: Path) -> bytes:
    """Returns the first `FIRST_BYTES` bytes of a file, or none if the file cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(FIRST_BYTES)
    except OSError:
        return b""


def check_is_file(what: str, file: Path, wanted: str) -> None:
    """Checks that a user's file is there and is not a pointer to another file.

    Args:
      what: the beginning of the message, such as "--text=a.txt" or the path alone.
      file: path of a file; pipes and devices are accepted, but not opened.
      wanted: what the user should name instead, such as "a text file in UTF-8".

    Raises:
      MissingFileError: if there is no file, or a link leads nowhere.
      UserError: if the file is a pointer or an archive.
    """
    if not file.exists():
        raise MissingFileError(f"{what} {absence(file)}; name {wanted}.")
    if file.is_dir():
        raise MissingFileError(f"{what} is a folder; name {wanted}.")
    if stat.S_ISREG(file.stat().st_mode):
        refuse_stand_in(what, first_bytes(file))


def is_there(file: Path) -> bool:
    """Returns whether a file exists; refuses a broken link, a pointer and an archive.

    Raises:
      MissingFileError: if the file is a broken link.
      UserError: if the file is a pointer or an archive.
    """
    if file.is_symlink() and not file.exists():
        raise MissingFileError(f"{file} {absence(file)}.")
    if not file.is_file():
        return False
    refuse_stand_in(file, first_bytes(file))
    return True


def absence(file: Path) -> str:
    """Returns why there is no file: "does not exist", or the target of the link that is broken."""
    if file.is_symlink():
        return (
            f"is a link to {file.readlink()}, which does not exist; fetch the target (`dvc pull`, "
            "`git annex get`), or replace the link"
        )
    return "does not exist"


def _first_match(kinds: dict[re.Pattern[bytes], Kind], first: bytes) -> Kind | None:
    return next((kind for pattern, kind in kinds.items() if pattern.match(first)), None)


def _is_text(first: bytes) -> bool:
    """Returns whether bytes are UTF-8 without control characters; the last character may be cut."""
    try:
        text = first.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(first) - 3:
            return False
        text = first[: error.start].decode("utf-8")
    return all(character >= " " or character in "\t\n\v\f\r" for character in text)
