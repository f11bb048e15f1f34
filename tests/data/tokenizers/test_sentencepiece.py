from pathlib import Path

import pytest
import sentencepiece

from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, changes_text
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from tests.data.example_tokenizers import TEXTS
from tests.data.tokenizers.test_round_trip import HOSTILE


def test_ids_equal_raw_sentencepiece(trained: Tokenizer) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(trained.file))
    for text in [*TEXTS, *(t for t in HOSTILE.values() if "\u2581" not in t)]:
        assert trained.encode(text) == raw.encode(text)
    assert (trained.vocab_size, trained.bos_id, trained.eos_id) == (400, 1, 2)
    assert [raw.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == [
        *("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>")
    ]


def test_the_space_mark_becomes_its_three_bytes(trained: Tokenizer) -> None:
    assert trained.encode("a\u2581")[-3:] == [3 + 0xE2, 3 + 0x96, 3 + 0x81]


@pytest.mark.parametrize("text", [t for t in HOSTILE.values() if "\u2581" in t and len(t) < 10_000])
def test_the_space_mark_is_to_its_neighbours_as_any_unknown_character(
    text: str, trained: Tokenizer
) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(trained.file))
    other = "\u0b95"  # three bytes too, in none of the texts nor in the vocabulary
    ids = " ".join(map(str, raw.encode(text.replace("\u2581", other))))
    theirs, ours = (" ".join(str(3 + b) for b in c.encode()) for c in (other, "\u2581"))
    assert trained.encode(text) == [int(i) for i in ids.replace(theirs, ours).split()]


def test_a_piece_may_hold_private_use_characters(tmp_path: Path) -> None:
    """Then another one stands for the space mark."""
    texts = ["\ue000\ue001 \ue000\ue001 and \ue001\ue000 again\n" * 20]
    tokenizer = train_tokenizer(texts, 275, tmp_path / "tokenizer.model")
    assert len(tokenizer.encode("\ue000\ue001")) < 6  # bytes
    for text in ("\u2581\ue000\u2581\ue001", "\ue002\u2581\ue002", "\u2581"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_without_byte_fallback_unknown_characters_are_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "closed"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=65, minloglevel=2
    )
    tokenizer = load_tokenizer(prefix.with_suffix(".model"))
    assert tokenizer.decode(tokenizer.encode("the lazy dog")) == "the lazy dog"
    with pytest.raises(ValueError, match=r"no token for 'é' \(U\+00E9\) and no byte fallback"):
        tokenizer.encode("caf\u00e9")
    with pytest.raises(ValueError, match=r"U\+2581"):
        tokenizer.encode("a\u2581b")
    assert changes_text(load_tokenizer_that_normalises(tmp_path))


def load_tokenizer_that_normalises(folder: Path) -> Tokenizer:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "nfkc"),
        vocab_size=325,
        byte_fallback=True,
        minloglevel=2,
    )
    return load_tokenizer(folder / "nfkc.model")
