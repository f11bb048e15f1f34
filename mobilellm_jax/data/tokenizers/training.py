"""Trains a SentencePiece tokenizer with BPE, byte fallback and no normalization."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from mobilellm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, check_unicode
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import rundir

# SentencePiece ignores sentences that exceed its length limit, so `_lines` divides long lines into
# shorter ones.
_MAX_LINE_CHARACTERS = 8192
_MAX_SENTENCE_BYTES = 4 * _MAX_LINE_CHARACTERS
_BYTES_AND_SPECIAL = 256 + 3
# Share of the text's characters that get a token. Byte fallback expresses the rarest characters.
_CHARACTER_COVERAGE = 0.9995


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: Path) -> Tokenizer:
    """Trains SentencePiece BPE on `texts` and writes the model to `output`.

    An error never leaves an incomplete file. Equal texts in equal order give an equal file. Id 0 is
    the unknown token (never produced), 1 is BOS, 2 is EOS, and 3 to 258 are bytes. All texts are in
    memory during training.

    Raises:
      UserError: if `vocab_size` is too large or too small for the texts, or the texts are empty.
    """
    if vocab_size <= _BYTES_AND_SPECIAL:
        raise UserError(
            f"vocab_size={vocab_size} must exceed {_BYTES_AND_SPECIAL}: 256 bytes, 3 special "
            "tokens and the text's characters."
        )
    lines = [line for text in texts for line in _lines(text)]
    if not lines:
        raise UserError("There is no text to train a tokenizer on; the sources are empty.")
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


def _lines(text: str) -> Iterator[str]:
    """Yields the lines of `text` for training, and divides long lines.

    A newline is encoded as a byte token, so no piece of the vocabulary spans two lines.
    """
    check_unicode(text)
    for line in text.split("\n"):
        for start in range(0, len(line), _MAX_LINE_CHARACTERS):
            yield line[start : start + _MAX_LINE_CHARACTERS]


def _vocabulary_error(vocab_size: int, error: RuntimeError) -> Exception:
    """Returns a UserError if `error` is about the vocabulary size, otherwise `error` itself."""
    if match := re.search(r"Vocabulary size too high.*<= (\d+)", str(error)):
        return UserError(
            f"vocab_size={vocab_size} is too large for this text, which supports at most "
            f"{match[1]}; lower --vocab_size or add sources."
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return UserError(
            f"vocab_size={vocab_size} must be at least {match[1]}: 256 bytes, 3 special tokens and "
            "the text's characters."
        )
    return error
