"""The interface of a tokenizer: text to token ids and back, without loss."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.errors import UserError

TOKENIZER_CONFIG = "tokenizer_config.json"

MAX_VOCABULARY = 1 << 24
"""Largest vocabulary of a tokenizer and of tokens, 60 times the largest vocabulary in use."""

SPACE_MARK = "\u2581"


class Tokenizer(Protocol):
    """The interface of every tokenizer."""

    @property
    def file(self) -> Path:
        """The file that the tokenizer was loaded from."""

    @property
    def kind(self) -> str:
        """Kind of the tokenizer, for messages."""

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""

    @property
    def bos_id(self) -> int:
        """Id before every document."""

    @property
    def eos_id(self) -> int:
        """Id after every document."""

    @property
    def unknown_id(self) -> int | None:
        """Id for unknown text in documents that others encoded, or None."""

    @property
    def byte_ids(self) -> Sequence[int]:
        """Ids of the bytes 0 to 255, for characters without an id; empty without byte fallback."""

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the file."""

    def encode(self, text: str) -> list[int]:
        """Returns ids without BOS and EOS; a literal "<s>" in `text` is plain text.

        Raises:
          UserError: if ids cannot express `text`.
        """

    def encode_documents(
        self, texts: Sequence[str], dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Returns BOS, `encode(text)`, EOS of all texts as one array, and the start of each text.

        An empty text gives BOS and EOS. `dtype` must hold `vocab_size - 1`. The method uses one
        thread, because `prepare` runs it in a process per core.

        Raises:
          UserError: if ids cannot express one of the texts.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text without BOS and EOS."""


def changes_text(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokenizer normalizes, so that decoding does not give the text back."""
    # The probes contain spaces at the edges and in a row, line ends, NFC, NFKC of a ligature and of
    # a wide letter, and characters that some tokenizers drop silently.
    for probe in ("  a  b  ", "a\t\r\n\nb", "e\u0301", "\ufb01", "\uff21", "\x00", "\U0001f600"):
        try:
            if tokenizer.decode(tokenizer.encode(probe)) != probe:
                return True
        except ValueError:
            continue  # a refused text is not changed silently
    return False


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
    """Returns the rows as one array, and the start of each row, as for `encode_documents`."""
    assert vocab_size - 1 <= np.iinfo(dtype).max, f"{dtype} cannot hold ids below {vocab_size}"
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    joined = np.concatenate(rows, dtype=dtype, casting="unsafe") if rows else np.empty(0, dtype)
    return joined, np.cumsum(lengths) - lengths
