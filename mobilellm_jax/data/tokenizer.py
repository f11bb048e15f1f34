"""Text to token ids and back, losing nothing: SentencePiece models and `tokenizer.json` files.

A tokenizer trained here is BPE with byte fallback and no normalisation, so `decode(encode(x)) == x`
for every text. SentencePiece itself writes spaces as U+2581 and would turn that character, met in a
text, into a space; `encode` gives it its three bytes instead, which decode to the character.
"""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from mobilellm_jax import rundir

TOKENIZER_CONFIG = "tokenizer_config.json"

_SPACE_MARK = "\u2581"
_PRIVATE_USE = range(0xE000, 0xF900)
# SentencePiece ignores sentences beyond a length limit, so that lines are cut well below ours.
_MAX_LINE_CHARACTERS = 8192
_MAX_SENTENCE_BYTES = 4 * _MAX_LINE_CHARACTERS
_BYTES_AND_SPECIAL = 256 + 3
# Of all characters of the text; the rarest ones are left to byte fallback.
_CHARACTER_COVERAGE = 0.9995
# Where no tokenizer_config.json names them: Llama 1 and 2, Llama 3, Gemma, GPT-2 and NeoX.
_USUAL_BOS_EOS = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
    ("<|endoftext|>", "<|endoftext|>"),
)


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    @property
    def file(self) -> Path:
        """The file it was loaded from."""

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
    def sha256(self) -> str:
        """Hexadecimal checksum of the file."""

    def encode(self, text: str) -> list[int]:
        """Returns ids without BOS and EOS; a literal "<s>" in `text` is plain text.

        Raises:
          ValueError: if ids cannot hold `text`.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text, computed on all cores."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text; BOS and EOS are dropped."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Opens a SentencePiece `*.model`, a `tokenizer.json`, or a folder that holds either.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no tokenizer, or has no BOS or EOS.
    """
    file: Path | None = path
    if path.is_dir():
        file = rundir.tokenizer_file(path)
    if file is None or not file.is_file():
        wanted = f" ({' or '.join(rundir.TOKENIZER_FILES)})" if path.is_dir() else ""
        raise FileNotFoundError(f"tokenizer={str(path)!r}: no tokenizer file there{wanted}.")
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file)
    raise ValueError(
        f"tokenizer={str(path)!r} must be a SentencePiece *.model or a Hugging Face tokenizer.json."
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: Path) -> Tokenizer:
    """Trains SentencePiece BPE on `texts` and writes it to the file `output`, whole or not at all.

    Equal texts in equal order give an equal file. Ids: 0 unknown (never produced), 1 BOS, 2 EOS,
    3 to 258 bytes. All texts are held in memory.

    Raises:
      ValueError: if `vocab_size` is too large or too small for the texts, or they are empty.
    """
    if vocab_size <= _BYTES_AND_SPECIAL:
        raise ValueError(
            f"vocab_size={vocab_size} must exceed {_BYTES_AND_SPECIAL}: 256 bytes, 3 special "
            "tokens and the text's characters."
        )
    lines = [line for text in texts for line in _lines(text)]
    if not lines:
        raise ValueError("There is no text to train a tokenizer on; the sources are empty.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=_CHARACTER_COVERAGE,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _vocabulary_error(vocab_size, error) from error
    rundir.write_whole(output, model.getvalue())
    return SentencePieceTokenizer(output)


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Copies the tokenizer into `folder` under its usual name and returns the copy.

    A `tokenizer_config.json` beside a `tokenizer.json` goes along: it may name BOS and EOS.
    """
    model = tokenizer.file.suffix == ".model"
    copy = folder / (rundir.SENTENCEPIECE_MODEL if model else rundir.TOKENIZER_JSON)
    shutil.copyfile(tokenizer.file, copy)
    config = tokenizer.file.parent / TOKENIZER_CONFIG
    if not model and config.is_file():
        shutil.copyfile(config, folder / TOKENIZER_CONFIG)
    return copy


def changes_text(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokenizer normalises, so that decoding does not give back the text."""
    # Spaces at the edges and in a row, line ends, NFC, NFKC of a ligature and of a wide letter.
    for probe in ("  a  b  ", "a\t\r\n\nb", "e\u0301", "\ufb01", "\uff21"):
        try:
            if tokenizer.decode(tokenizer.encode(probe)) != probe:
                return True
        except ValueError:
            continue  # refused, so not changed in silence
    return False


class SentencePieceTokenizer:
    """A SentencePiece model; see the module's docstring for U+2581."""

    def __init__(self, file: Path) -> None:
        content = file.read_bytes()
        if not content:
            # SentencePiece takes it for a model without pieces, and answers with defaults.
            raise ValueError(f"{file} is not a SentencePiece model: it is empty.")
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{file} is not a SentencePiece model: {error}") from error
        self.file = file
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{file} has bos_id={self.bos_id} and eos_id={self.eos_id}; both are needed, since "
                "documents are stored as BOS text EOS. Train the model with bos_id and eos_id >= 0."
            )
        pieces = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        self._byte_ids = {piece: i for i, piece in enumerate(pieces) if self._model.is_byte(i)}
        self._characters = frozenset("".join(pieces))

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            _check_unicode(text)
        stand_ins = [self._stand_in(text) for text in texts]
        written = [
            text.replace(_SPACE_MARK, stand_in) if stand_in else text
            for text, stand_in in zip(texts, stand_ins, strict=True)
        ]
        threads = 1 if len(texts) == 1 else -1
        ids: list[list[int]] = self._model.encode(written, out_type=int, num_threads=threads)
        for row, (text, stand_in) in enumerate(zip(texts, stand_ins, strict=True)):
            if stand_in:
                ids[row] = _replace_run(ids[row], self._bytes(stand_in), self._bytes(_SPACE_MARK))
            if not self._byte_ids and self._model.unk_id() in ids[row]:
                raise self._unknown(text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        outer = (self.bos_id, self.eos_id)
        text: str = self._model.decode([int(i) for i in ids if i not in outer])
        return text

    def _bytes(self, character: str) -> list[int]:
        return [self._byte_ids[f"<0x{byte:02X}>"] for byte in character.encode()]

    def _stand_in(self, text: str) -> str:
        """Returns a character that marks where U+2581 was, or '' if the text has none.

        It occurs neither in the text nor in the vocabulary, so it comes out as its own bytes.
        """
        if _SPACE_MARK not in text:
            return ""
        if not self._byte_ids:
            raise self._unknown(_SPACE_MARK)
        used = self._characters.union(text)
        free = next((chr(c) for c in _PRIVATE_USE if chr(c) not in used), None)
        if free is None:
            raise ValueError(
                "A text holds U+2581 and every private-use character from U+E000 to U+F8FF, so "
                "none is left to stand for U+2581; remove one of them from the text."
            )
        return free

    def _unknown(self, text: str) -> ValueError:
        unknown = (
            c for c in text if c == _SPACE_MARK or self._model.unk_id() in self._model.encode(c)
        )
        character = next(unknown, "")
        return ValueError(
            f"{self.file} has no token for {character!r} (U+{ord(character or chr(0)):04X}) and no "
            "byte fallback, so the text would be lost; use a tokenizer with byte fallback."
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
        self.sha256 = hashlib.sha256(content).hexdigest()
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        special = [token["content"] for token in parsed["added_tokens"] if token.get("special")]
        bos, eos = _bos_eos(file, special)
        missing = [token for token in (bos, eos) if token not in vocabulary]
        if missing:
            raise ValueError(f"{file} has no token {missing[0]!r}, which {TOKENIZER_CONFIG} names.")
        self.bos_id, self.eos_id = vocabulary[bos], vocabulary[eos]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            _check_unicode(text)
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        rows: list[list[int]] = [row.ids for row in encoded]
        for text, ids in zip(texts, rows, strict=True):
            if _SPACE_MARK in text and self.decode(ids) != text:
                raise ValueError(
                    f"A text holds U+2581, which {self.file} turns into a space; replace it in the "
                    "text, or use a byte-level tokenizer or a SentencePiece *.model."
                )
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        outer = (self.bos_id, self.eos_id)
        kept = [int(i) for i in ids if i not in outer]
        text: str = self._model.decode(kept, skip_special_tokens=False)
        return text


def _lines(text: str) -> Iterator[str]:
    """Yields the text's lines, long ones in parts, for training only.

    The newline itself is left to its byte token, so that pieces never reach over a line's end.
    """
    _check_unicode(text)
    for line in text.split("\n"):
        for start in range(0, len(line), _MAX_LINE_CHARACTERS):
            yield line[start : start + _MAX_LINE_CHARACTERS]


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Character {error.start} of the text is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}), which is no character; read the text as UTF-8, or "
            "replace it with U+FFFD."
        ) from error


def _replace_run(ids: list[int], old: list[int], new: list[int]) -> list[int]:
    replaced: list[int] = []
    at = 0
    while at < len(ids):
        if ids[at : at + len(old)] == old:
            replaced += new
            at += len(old)
        else:
            replaced.append(ids[at])
            at += 1
    return replaced


def _vocabulary_error(vocab_size: int, error: RuntimeError) -> Exception:
    """Returns our message for SentencePiece's complaints about the size, else `error` itself."""
    if match := re.search(r"Vocabulary size too high.*<= (\d+)", str(error)):
        return ValueError(
            f"vocab_size={vocab_size} is too large for this text, which supports at most "
            f"{match[1]}; lower --vocab_size or add sources."
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return ValueError(
            f"vocab_size={vocab_size} must be at least {match[1]}: 256 bytes, 3 special tokens and "
            "the text's characters."
        )
    return error


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
