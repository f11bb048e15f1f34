"""Tokenizers from SentencePiece models (`*.model`) that preserve the character U+2581.

SentencePiece represents spaces by U+2581, so decoding would turn a U+2581 of a text into a space.
This module encodes a U+2581 of a text as the tokens of its three UTF-8 bytes, which decode to
U+2581.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from mobilellm_jax.data.tokenizers.folder import Folder, identity
from mobilellm_jax.data.tokenizers.tokenizer import (
    BYTE_PIECES,
    SENTENCEPIECE,
    SPACE_MARK,
    Convention,
    check_unicode,
    document_start,
    join_documents,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import file_kind

_PRIVATE_USE = range(0xE000, 0xF900)  # Each has three bytes in UTF-8, as U+2581 has.


class SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model."""

    def __init__(self, file: Path, *, ours: bool = False) -> None:
        content = file.read_bytes()
        if not content:
            # SentencePiece would accept an empty file as a model without pieces and use default
            # values.
            raise UserError(f"{file} is not a SentencePiece model: it is empty.")
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            kind = file_kind.explanation(content[: file_kind.FIRST_BYTES])
            raise UserError(f"{file} is not a SentencePiece model: {error}{kind}") from error
        self.file = file
        self.kind = SENTENCEPIECE
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(
                f"{file} has bos_id={self.bos_id} and eos_id={self.eos_id}; both must be 0 or "
                "more, because every document is stored between BOS and EOS. Train the model with "
                "bos_id and eos_id >= 0."
            )
        try:
            pieces = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        except UnicodeDecodeError as error:
            raise UserError(f"{file} has a piece that is not UTF-8: {error.reason}.") from error
        self.pieces = pieces
        self.unknown_id: int | None = self._model.unk_id()
        byte_ids = {piece: i for i, piece in enumerate(pieces) if self._model.is_byte(i)}
        if byte_ids and byte_ids.keys() != {*BYTE_PIECES}:
            raise UserError(
                f"{file} has tokens for {len(byte_ids)} bytes; it must have tokens for all 256 "
                "bytes or for none."
            )
        self.byte_ids = [byte_ids[piece] for piece in BYTE_PIECES] if byte_ids else []
        # This character replaces U+2581 before encoding. No piece of the vocabulary contains it, so
        # SentencePiece encodes it as its three bytes.
        used = frozenset("".join(pieces))
        self._stand_in = next((chr(c) for c in _PRIVATE_USE if chr(c) not in used), None)
        self._take_roles(Folder(file, ours=ours), hashlib.sha256(content).hexdigest())

    def _take_roles(self, folder: Folder, file_sha256: str) -> None:
        """Takes BOS, EOS and the convention from the companions of the file, if they say more."""
        own = {"bos": self.bos_id, "eos": self.eos_id}
        if folder.token("bos_token") in self.pieces:
            self.bos_id = self.pieces.index(folder.token("bos_token"))
        if folder.token("eos_token") in self.pieces:
            self.eos_id = self.pieces.index(folder.token("eos_token"))
        self.has_bos = True
        default = Convention(before=(self.bos_id,), after=(), end_ids=(self.eos_id,))
        # LLaMA's tokenizer in transformers has these defaults.
        stated = Convention(
            before=(self.bos_id,) * (folder.facts.get("add_bos_token") is not False),
            after=(self.eos_id,) * (folder.facts.get("add_eos_token") is True),
            end_ids=(),
        )
        self.convention = folder.convention(self.eos_id, stated, default)
        facts = {
            "bos": self.bos_id,
            "eos": self.eos_id,
            "before": self.convention.before,
            "end_ids": sorted(self.convention.end_ids),
            "chat_template": folder.chat_template(),
        }
        bare = {"before": (own["bos"],), "end_ids": [own["eos"]], "chat_template": None}
        self.sha256 = identity(file_sha256, facts, own | bare)

    def encode(self, text: str) -> list[int]:
        [row] = self._encode([text])
        ids: list[int] = row.tolist()
        return ids

    def encode_documents(
        self, texts: Sequence[str], dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        start, end = np.array(document_start(self), np.int32), np.array([self.eos_id], np.int32)
        rows = [np.concatenate([start, row, end]) for row in self._encode(texts)]
        return join_documents(rows, dtype, self.vocab_size)

    def decode(self, ids: Iterable[int]) -> str:
        outer = (self.bos_id, self.eos_id)
        # The vocabulary of a model may be larger than that of its tokenizer.
        kept = [int(i) for i in ids if i not in outer and i < self.vocab_size]
        text: str = self._model.decode(kept)
        return text

    def _encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        for text in texts:
            check_unicode(text)
        # NumPy arrays need no Python object for each token.
        rows: list[NDArray[np.int32]] = self._model.encode(
            [self._without_space_mark(text) for text in texts],
            out_type="numpy",
            num_threads=1,
        )
        for index, text in enumerate(texts):
            if SPACE_MARK in text:
                rows[index] = self._with_space_mark(rows[index], text)
            if not self.byte_ids and self.unknown_id in rows[index]:
                raise self._unknown(text)
        return rows

    def _without_space_mark(self, text: str) -> str:
        if SPACE_MARK not in text:
            return text
        if self._stand_in is None or not self.byte_ids:
            raise self._unknown(SPACE_MARK)
        return text.replace(SPACE_MARK, self._stand_in)

    def _with_space_mark(self, ids: NDArray[np.int32], text: str) -> NDArray[np.int32]:
        """Replaces the stand-in's bytes by the bytes of U+2581 wherever `text` has U+2581."""
        assert self._stand_in is not None, "_without_space_mark was called before"
        first, second, third = self._bytes(self._stand_in)
        stands = (ids[:-2] == first) & (ids[1:-1] == second) & (ids[2:] == third)
        # `text` itself may contain the stand-in. The order of U+2581 and the stand-in in `text`
        # shows which stand-ins in `ids` replaced U+2581.
        found = re.findall(f"[{SPACE_MARK}{self._stand_in}]", text)
        positions = np.flatnonzero(stands)
        assert len(positions) == len(found), f"{self.file} lost {self._stand_in!r}"
        marks = positions[[character == SPACE_MARK for character in found]]
        replaced = ids.copy()
        for offset, byte in enumerate(self._bytes(SPACE_MARK)):
            replaced[marks + offset] = byte
        return replaced

    def _bytes(self, character: str) -> list[int]:
        return [self.byte_ids[byte] for byte in character.encode()]

    def _unknown(self, text: str) -> UserError:
        unknown = (c for c in text if c == SPACE_MARK or self.unknown_id in self._model.encode(c))
        character = next(unknown, "")
        return UserError(
            f"{self.file} has no token for {character!r} (U+{ord(character or chr(0)):04X}) and no "
            "byte fallback, so the text would be lost; use a tokenizer with byte fallback."
        )
