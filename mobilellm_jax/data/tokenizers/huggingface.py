"""Tokenizers from the `tokenizer.json` files of Hugging Face's `tokenizers` library."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mobilellm_jax.data.tokenizers.tokenizer import (
    BYTE_PIECES,
    MAX_VOCABULARY,
    SPACE_MARK,
    TOKENIZER_CONFIG,
    check_unicode,
    join_documents,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import file_kind, strict_json
from mobilellm_jax.storage.strict_json import plain, shown

_SHOWN_TOKENS = 20

# Names of BOS and EOS that are tried if there is no tokenizer_config.json. In this order,
# they come from Llama 1 and 2, from Llama 3, from Gemma, and from GPT-2 and NeoX.
_USUAL_BOS_EOS = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
    ("<|endoftext|>", "<|endoftext|>"),
)


class _Description(NamedTuple):
    """The fields of a tokenizer.json that this module reads without the library."""

    kind: str
    unknown: str | None
    unknown_id: int | None
    byte_fallback: bool
    special: list[str]

    @classmethod
    def of(cls, parsed: Any) -> "_Description":
        model = strict_json.get(parsed, "model", dict[str, Any])
        tokens = strict_json.get(parsed, "added_tokens", list[dict[str, Any]])
        return cls(
            kind=strict_json.get(model, "type", str, "", "model"),
            unknown=strict_json.get(model, "unk_token", str, None, "model"),
            unknown_id=strict_json.get(model, "unk_id", int, None, "model"),
            byte_fallback=strict_json.get(model, "byte_fallback", bool, False, "model"),
            special=[
                strict_json.get(token, "content", str, name=f"added_tokens[{i}]")
                for i, token in enumerate(tokens)
                if strict_json.get(token, "special", bool, False, f"added_tokens[{i}]")
            ],
        )


class HuggingFaceTokenizer:
    """The tokenizer of a `tokenizer.json` file, without its truncation and padding."""

    def __init__(self, file: Path) -> None:
        try:
            content = strict_json.content_of(file)
            parsed = strict_json.parse(content)
            if not isinstance(parsed, dict) or not {"model", "added_tokens"} <= parsed.keys():
                raise strict_json.JsonError(
                    "has no `model` and `added_tokens`, so it is not a tokenizer.json of the "
                    "`tokenizers` library; give a tokenizer.json (not tokenizer_config.json or "
                    "vocab.json)."
                )
            described = _Description.of(parsed)
            self._model: Any = _refused(tokenizers.Tokenizer.from_str, content.decode())
        except strict_json.JsonError as error:
            raise UserError(f"{file}: {error}") from error
        self._model.no_truncation()
        self._model.no_padding()
        # With this setting, "<s>" in a text is encoded as plain text and not as the BOS token.
        self._model.encode_special_tokens = True
        self.file = file
        self.kind = f"Hugging Face {described.kind}".rstrip()
        self.sha256 = hashlib.sha256(content).hexdigest()
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 1 <= self.vocab_size <= MAX_VOCABULARY:
            raise UserError(
                f"{file} has a vocabulary of {self.vocab_size:,} ids (largest id + 1); it must "
                f"have 1 to {MAX_VOCABULARY:,}."
            )
        # The file of a Unigram model contains the id of the unknown token. The files of other
        # models contain its text.
        self.unknown_id = vocabulary.get(described.unknown or "", described.unknown_id)
        if self.unknown_id is not None and not 0 <= self.unknown_id < self.vocab_size:
            raise UserError(
                f"{file}: model.unk_id={self.unknown_id} must be at least 0 and less than "
                f"the size of the vocabulary, {self.vocab_size}."
            )
        falls_back = described.byte_fallback and vocabulary.keys() >= {*BYTE_PIECES}
        self.byte_ids = [vocabulary[piece] for piece in BYTE_PIECES] if falls_back else []
        bos, eos = _bos_eos(file, described.special)
        missing = [token for token in (bos, eos) if token not in vocabulary]
        if missing:
            raise UserError(
                f"{file} has no token {shown(missing[0])}, which {TOKENIZER_CONFIG} names."
            )
        self.bos_id, self.eos_id = vocabulary[bos], vocabulary[eos]

    def encode(self, text: str) -> list[int]:
        check_unicode(text)
        # Texts are encoded one by one, because the library would use several threads for a batch.
        ids: list[int] = self._encoding(text).ids
        if self.unknown_id is not None and self.unknown_id in ids:
            raise self._unknown(text)
        if SPACE_MARK in text and self.decode(ids) != text:
            raise UserError(
                f"A text contains U+2581, which {self.file} turns into a space; replace it in the "
                "text, or use a byte-level tokenizer or a SentencePiece *.model."
            )
        return ids

    def encode_documents(
        self, texts: Sequence[str], dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        rows = [np.array([self.bos_id, *self.encode(text), self.eos_id]) for text in texts]
        return join_documents(rows, dtype, self.vocab_size)

    def decode(self, ids: Iterable[int]) -> str:
        outer = (self.bos_id, self.eos_id)
        kept = [int(i) for i in ids if i not in outer]
        text: str = self._model.decode(kept, skip_special_tokens=False)
        return text

    def _encoding(self, text: str) -> Any:
        try:
            return _refused(self._model.encode, text, add_special_tokens=False)
        except strict_json.JsonError as error:
            raise UserError(f"{self.file} cannot encode a text: {error}") from error

    def _unknown(self, text: str) -> UserError:
        encoding = self._encoding(text)
        start, stop = encoding.offsets[encoding.ids.index(self.unknown_id)]
        return UserError(
            f"{self.file} has no token for {text[start:stop]!r}, so the text would be lost; use a "
            "tokenizer with byte fallback, or a byte-level one."
        )


def _refused(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls a function of the library, and turns the library's errors into a `JsonError`."""
    try:
        return call(*args, **options)
    except BaseException as error:
        # The library raises `Exception` or `PanicException`, and the class of the latter cannot be
        # imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise strict_json.JsonError(f"the `tokenizers` library says: {error}") from error


def _bos_eos(file: Path, special: Sequence[str]) -> tuple[str, str]:
    """Returns the texts of BOS and EOS: from tokenizer_config.json, otherwise the usual names."""
    config = file.parent / TOKENIZER_CONFIG
    if file_kind.is_there(config):
        try:
            named = strict_json.parse(strict_json.content_of(config))
            bos, eos = _token_text(named, "bos_token"), _token_text(named, "eos_token")
        except strict_json.JsonError as error:
            raise UserError(f"{config}: {error}") from error
        if eos:
            # Qwen and some other models have no BOS, and separate documents by EOS. They
            # also use EOS as BOS.
            return bos or eos, eos
    for bos, eos in _USUAL_BOS_EOS:
        if bos in special and eos in special:
            return bos, eos
    shown_tokens = ", ".join(map(plain, special[:_SHOWN_TOKENS]))
    raise UserError(
        f"{file} does not say which tokens are BOS and EOS; its special tokens are "
        f"{shown_tokens or 'none'}. Put a {TOKENIZER_CONFIG} with bos_token and eos_token "
        "into its folder."
    )


def _token_text(config: Any, key: str) -> str:
    """Returns the text of a token, which `config` stores as a string or as an object."""
    token = strict_json.get(config, key, Any, "")
    if isinstance(token, dict):
        return str(strict_json.get(token, "content", str, name=key))
    return str(strict_json.get(config, key, str, ""))
