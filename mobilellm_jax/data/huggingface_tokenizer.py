"""`tokenizer.json` files of Hugging Face's `tokenizers` library as tokenizers."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mobilellm_jax.data.tokenizer import (
    SPACE_MARK,
    TOKENIZER_CONFIG,
    check_unicode,
    join_documents,
)

# Where no tokenizer_config.json names them: Llama 1 and 2, Llama 3, Gemma, GPT-2 and NeoX.
_USUAL_BOS_EOS = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
    ("<|endoftext|>", "<|endoftext|>"),
)


class HuggingFaceTokenizer:
    """A `tokenizer.json`, taken as it is except that it may neither cut nor pad."""

    def __init__(self, file: Path) -> None:
        content = file.read_bytes()
        try:
            parsed = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(parsed, dict) or not {"model", "added_tokens"} <= parsed.keys():
            raise ValueError(
                f"{file} has no `model` and `added_tokens`, so it is no tokenizer.json of the "
                "`tokenizers` library; give that file (not tokenizer_config.json or vocab.json)."
            )
        self._model: Any = tokenizers.Tokenizer.from_str(content.decode())
        self._model.no_truncation()
        self._model.no_padding()
        # A literal "<s>" in a text is text, not the token.
        self._model.encode_special_tokens = True
        self.file = file
        self.kind = f"Hugging Face {parsed['model'].get('type', '')}".rstrip()
        self.sha256 = hashlib.sha256(content).hexdigest()
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        # A model of the Unigram kind names its unknown token by id, the others by text.
        unknown = parsed["model"].get("unk_token")
        self.unknown_id: int | None = vocabulary.get(unknown, parsed["model"].get("unk_id"))
        bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
        falls_back = parsed["model"].get("byte_fallback") and vocabulary.keys() >= {*bytes_of}
        self.byte_ids = [vocabulary[piece] for piece in bytes_of] if falls_back else []
        special = [token["content"] for token in parsed["added_tokens"] if token.get("special")]
        bos, eos = _bos_eos(file, special)
        missing = [token for token in (bos, eos) if token not in vocabulary]
        if missing:
            raise ValueError(f"{file} has no token {missing[0]!r}, which {TOKENIZER_CONFIG} names.")
        self.bos_id, self.eos_id = vocabulary[bos], vocabulary[eos]

    def encode(self, text: str) -> list[int]:
        check_unicode(text)
        # One at a time: a batch would start the library's threads, one per core.
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        if self.unknown_id is not None and self.unknown_id in ids:
            raise self._unknown(text)
        if SPACE_MARK in text and self.decode(ids) != text:
            raise ValueError(
                f"A text holds U+2581, which {self.file} turns into a space; replace it in the "
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

    def _unknown(self, text: str) -> ValueError:
        encoding = self._model.encode(text, add_special_tokens=False)
        start, stop = encoding.offsets[encoding.ids.index(self.unknown_id)]
        return ValueError(
            f"{self.file} has no token for {text[start:stop]!r}, so the text would be lost; use a "
            "tokenizer with byte fallback, or a byte-level one."
        )


def _bos_eos(file: Path, special: Sequence[str]) -> tuple[str, str]:
    """Returns BOS and EOS as text: from tokenizer_config.json beside `file`, else by custom."""
    config = file.parent / TOKENIZER_CONFIG
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8"))
        bos, eos = (_token_text(named.get(key)) for key in ("bos_token", "eos_token"))
        if eos:
            # Qwen and others have no BOS: there EOS alone parts the documents.
            return bos or eos, eos
    for bos, eos in _USUAL_BOS_EOS:
        if bos in special and eos in special:
            return bos, eos
    raise ValueError(
        f"{file} does not say which tokens are BOS and EOS; its special tokens are "
        f"{', '.join(special) or 'none'}. Put a {TOKENIZER_CONFIG} with bos_token and eos_token "
        "beside it."
    )


def _token_text(token: Any) -> str:
    """A token stands in tokenizer_config.json as its text or as an object with `content`."""
    return str(token["content"]) if isinstance(token, dict) else str(token or "")
