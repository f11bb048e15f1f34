"""Tokenizers from the `tokenizer.json` files of Hugging Face's `tokenizers` library."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mobilellm_jax.data.tokenizers.folder import Folder, identity
from mobilellm_jax.data.tokenizers.tokenizer import (
    BYTE_PIECES,
    MAX_VOCABULARY,
    SPACE_MARK,
    TOKENIZER_CONFIG,
    Convention,
    check_unicode,
    document_start,
    join_documents,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import strict_json
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
    drops_unknown: bool  # The library drops a character without a token, and says nothing.
    special: list[str]

    @classmethod
    def of(cls, parsed: Any) -> "_Description":
        model = strict_json.get(parsed, "model", dict[str, Any])
        marks = ("continuing_subword_prefix", "end_of_word_suffix")
        tokens = strict_json.get(parsed, "added_tokens", list[dict[str, Any]])
        return cls(
            kind=strict_json.get(model, "type", str, "", "model"),
            unknown=strict_json.get(model, "unk_token", str, None, "model"),
            unknown_id=strict_json.get(model, "unk_id", int, None, "model"),
            byte_fallback=strict_json.get(model, "byte_fallback", bool, False, "model"),
            drops_unknown=model.get("type") == "BPE"
            and model.get("unk_token") is None
            and not any(model.get(mark) for mark in marks),
            special=[
                strict_json.get(token, "content", str, name=f"added_tokens[{i}]")
                for i, token in enumerate(tokens)
                if strict_json.get(token, "special", bool, False, f"added_tokens[{i}]")
            ],
        )


class HuggingFaceTokenizer:
    """The tokenizer of a `tokenizer.json` file, without its truncation and padding."""

    def __init__(self, file: Path, *, ours: bool = False) -> None:
        content, described, self._model = _open(file)
        self.file = file
        self.kind = f"Hugging Face {described.kind}".rstrip()
        folder = Folder(file, ours=ours)
        added = _add_tokens(self._model, folder)
        stated = around_texts(self._model)
        self._drops_unknown = described.drops_unknown and not described.byte_fallback
        self._kept: set[str] = set()  # Characters of texts that `encode` does not drop.
        # With this setting, "<s>" in a text is encoded as plain text and not as the BOS token.
        self._model.encode_special_tokens = True
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
        bos, self.eos_id = _bos_eos(file, folder, vocabulary, described.special)
        # Qwen and some other models have no BOS, and separate documents by EOS.
        self.has_bos, self.bos_id = bos is not None, self.eos_id if bos is None else bos
        default = Convention(before=(self.bos_id,), after=(), end_ids=(self.eos_id,))
        self.convention = folder.convention(self.eos_id, stated, default)
        self.sha256 = _identity(content, self, folder, added)

    @property
    def pieces(self) -> list[str]:
        known = {token: text for text, token in self._model.get_vocab().items()}
        return [known.get(token, "") for token in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        check_unicode(text)
        if self._drops_unknown:
            self._check_characters(text)
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
        start = document_start(self)
        rows = [np.array([*start, *self.encode(text), self.eos_id]) for text in texts]
        return join_documents(rows, dtype, self.vocab_size)

    def decode(self, ids: Iterable[int]) -> str:
        outer = (self.bos_id, self.eos_id)
        # The vocabulary of a model may be larger than that of its tokenizer.
        kept = [int(i) for i in ids if i not in outer and i < self.vocab_size]
        text: str = self._model.decode(kept, skip_special_tokens=False)
        return text

    def _encoding(self, text: str) -> Any:
        try:
            return _refused(self._model.encode, text, add_special_tokens=False)
        except strict_json.JsonError as error:
            raise UserError(f"{self.file} cannot encode a text: {error}") from error

    def _check_characters(self, text: str) -> None:
        """Raises a `UserError` that names a character of `text` without a token."""
        new = set(text) - self._kept
        lost = {character for character in new if self._is_dropped(character)}
        self._kept |= new - lost
        # A normalizer may join a character with its neighbour, so the whole text decides.
        if lost and self._is_dropped(text):
            raise self._no_token(min(lost, key=text.index))

    def _is_dropped(self, text: str) -> bool:
        """Returns whether a part of `text` that reaches the model has no token."""
        model = self._model
        if model.normalizer is not None:
            text = model.normalizer.normalize_str(text)
        words = [(text, (0, len(text)))]
        if model.pre_tokenizer is not None:
            words = model.pre_tokenizer.pre_tokenize_str(text)
        parts = {character for word, _ in words for character in word}
        return any(model.token_to_id(part) is None for part in parts)

    def _unknown(self, text: str) -> UserError:
        encoding = self._encoding(text)
        start, stop = encoding.offsets[encoding.ids.index(self.unknown_id)]
        return self._no_token(text[start:stop])

    def _no_token(self, characters: str) -> UserError:
        return UserError(
            f"{self.file} has no token for {characters!r}, so the text would be lost; use a "
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


def _open(file: Path) -> tuple[bytes, _Description, Any]:
    """Returns the content of a tokenizer.json, its description, and the library's tokenizer."""
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
        model: Any = _refused(tokenizers.Tokenizer.from_str, content.decode())
    except strict_json.JsonError as error:
        raise UserError(f"{file}: {error}") from error
    model.no_truncation()
    model.no_padding()
    return content, described, model


def _add_tokens(model: Any, folder: Folder) -> list[str]:
    """Adds the tokens that only the companions of the file have, and returns their texts."""
    new: list[str] = []
    for token, fields in folder.added_tokens().items():
        text = fields["content"]
        if model.token_to_id(text) is not None:
            continue
        flags = {
            name: bool(fields[name])
            for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if name in fields
        }
        model.add_tokens([tokenizers.AddedToken(text, **flags)])
        found = model.token_to_id(text)
        if found != token:
            raise UserError(
                f"{folder.path}: the added token {shown(text)} has the id {token}, but it would "
                f"get {found}, the next free id of tokenizer.json; save the tokenizer again with "
                "transformers, which writes all tokens into tokenizer.json."
            )
        new.append(text)
    return new


def around_texts(model: Any) -> Convention:
    """Returns what the post-processor puts around a text; transformers puts the same there."""
    encoding = model.encode("a")
    added = [bool(each) for each in encoding.special_tokens_mask]
    first = added.index(False) if False in added else len(added)
    last = len(added) - (added[::-1].index(False) if False in added else 0)
    ids = encoding.ids
    return Convention(before=tuple(ids[:first]), after=tuple(ids[last:]), end_ids=())


def _bos_eos(
    file: Path, folder: Folder, vocabulary: dict[str, int], special: Sequence[str]
) -> tuple[int | None, int]:
    """Returns the ids of BOS and EOS: those that the folder names, otherwise of the usual names.

    BOS is None if the folder says that there is none.
    """
    bos, eos = folder.token("bos_token"), folder.token("eos_token")
    for token in filter(None, (bos, eos)):
        if token not in vocabulary:
            raise UserError(f"{file} has no token {shown(token)}, which {TOKENIZER_CONFIG} names.")
    if eos:
        return vocabulary.get(bos), vocabulary[eos]
    for usual_bos, usual_eos in _USUAL_BOS_EOS:
        if usual_bos in special and usual_eos in special:
            has_bos = not folder.names_no("bos_token")
            return vocabulary[bos or usual_bos] if has_bos else None, vocabulary[usual_eos]
    if stated := [token for token in folder.stated_ids("eos_token_id") if token < len(vocabulary)]:
        return vocabulary.get(bos), stated[0]
    shown_tokens = ", ".join(map(plain, special[:_SHOWN_TOKENS]))
    raise UserError(
        f"{file} does not say which tokens are BOS and EOS; its special tokens are "
        f"{shown_tokens or 'none'}. Put a {TOKENIZER_CONFIG} with bos_token and eos_token "
        "into its folder."
    )


def _identity(
    content: bytes, tokenizer: HuggingFaceTokenizer, folder: Folder, added: Sequence[str]
) -> str:
    convention = tokenizer.convention
    facts = {
        "bos": tokenizer.bos_id if tokenizer.has_bos else None,
        "eos": tokenizer.eos_id,
        "before": convention.before,
        "end_ids": sorted(convention.end_ids),
        "added": added,
        "chat_template": folder.chat_template(),
    }
    bare = {
        "before": (tokenizer.bos_id,),
        "end_ids": [tokenizer.eos_id],
        "added": [],
        "chat_template": None,
    }
    file_sha256 = hashlib.sha256(content).hexdigest()
    return identity(file_sha256, facts, facts | bare)
