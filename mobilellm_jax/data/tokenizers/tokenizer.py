"""The interface of a tokenizer: text to token ids and back, without loss."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.errors import UserError

TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE = "SentencePiece"
"""The `kind` of a tokenizer from a SentencePiece model."""

MAX_VOCABULARY = 1 << 24
"""Largest permitted vocabulary size, 60 times the largest vocabulary in use."""

SPACE_MARK = "\u2581"
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


# The probes contain spaces at both ends and several spaces in a row, line ends, characters that NFC
# or NFKC would change, and characters that some tokenizers drop without an error.
_PROBES = ("  a  b  ", "a\t\r\n\nb", "e\u0301", "\ufb01", "\uff21", "\x00", "\U0001f600")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convention:
    """The tokens that a tokenizer adds to a text, and the tokens that end a generated text."""

    before: tuple[int, ...]  # Tokens before every text.
    after: tuple[int, ...]  # Tokens that transformers puts after every text, but we never do.
    end_ids: tuple[int, ...]  # Each of these tokens ends a generated text.


@runtime_checkable  # The tests check the types of arguments.
class Tokenizer(Protocol):
    """The interface of every tokenizer."""

    file: Path  # The tokenizer was loaded from this file.
    kind: str  # Text for messages.
    vocab_size: int  # The largest id plus 1.
    bos_id: int  # If the tokenizer has no BOS, this is EOS.
    eos_id: int  # EOS is stored after every document.
    has_bos: bool
    convention: Convention
    unknown_id: int | None  # `encode` never returns the id of the unknown token.
    byte_ids: list[int]  # Ids of the bytes 0 to 255; empty if the tokenizer has no byte fallback.
    # Hexadecimal SHA-256 of the file, and of the facts in its folder if there are any.
    sha256: str

    @property
    def pieces(self) -> list[str]:
        """The texts of all tokens by id, as the tokenizer's file writes them."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without BOS and EOS; "<s>" in `text` is plain text.

        Raises:
          UserError: if the vocabulary cannot express `text`.
        """

    def encode_documents(
        self, texts: Sequence[str], dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Returns all documents as one array, and the documents' starts.

        A document is `document_start`, `encode(text)` and EOS. `dtype` must hold `vocab_size - 1`.
        The method uses one thread, because `prepare` runs one process per core.

        Raises:
          UserError: if the vocabulary cannot express one of the texts.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without BOS, EOS, and ids that are not below `vocab_size`."""


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text with the tokens that the tokenizer puts before every text."""
    return [*tokenizer.convention.before, *tokenizer.encode(text)]


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns `text_ids`; if there are none, the token after which a new document begins."""
    return text_ids(tokenizer, prompt) or [tokenizer.eos_id]


def document_start(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that are stored before every document.

    If BOS and EOS are one token, the EOS of the document before already separates the two.
    """
    before = tokenizer.convention.before
    return () if before == (tokenizer.eos_id,) else before


def changes_text(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokenizer normalizes text, so that decoding gives another text."""
    for probe in _PROBES:
        try:
            if tokenizer.decode(tokenizer.encode(probe)) != probe:
                return True
        except ValueError:
            continue  # A text that is refused is not changed.
    return False


def same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """Returns whether each id has the same meaning for both; one of them may have more ids.

    Their roles and conventions may differ. A tokenizer.json may hold the same pieces as a
    SentencePiece model.
    """
    if one.sha256 == other.sha256:
        return True
    pairs = zip(one.pieces, other.pieces, strict=False)
    return all(a == b for a, b in pairs) and all(
        _same_ids(one, other, probe) for probe in (*_PROBES, "don't say 123, THE 日本語")
    )


def _same_ids(one: Tokenizer, other: Tokenizer, text: str) -> bool:
    try:
        return one.encode(text) == other.encode(text)
    except UserError:
        return True  # The vocabulary of one of them cannot express the text.


def check_unicode(text: str) -> None:
    """Raises a UserError that names the first lone surrogate of `text`, if there is one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"Character {error.start} of the text is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}), not a character; read the text as UTF-8, or "
            "replace it with U+FFFD."
        ) from error


def join_documents(
    rows: Sequence[NDArray[Any]], dtype: np.dtype[Any], vocab_size: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Joins rows into one array; returns it and the start of each row, for `encode_documents`."""
    assert vocab_size - 1 <= np.iinfo(dtype).max, f"{dtype} cannot hold ids below {vocab_size}"
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    joined = np.concatenate(rows, dtype=dtype, casting="unsafe") if rows else np.empty(0, dtype)
    return joined, np.cumsum(lengths) - lengths


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Returns the length of the longest common prefix of two texts or lists of tokens."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
