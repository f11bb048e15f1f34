import random
from pathlib import Path

import pytest

from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from tests.data.example_tokenizers import TEXTS


def test_training_is_deterministic(trained: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), 400, tmp_path / "tokenizer.model")
    assert again.file.read_bytes() == trained.file.read_bytes()
    assert again.sha256 == trained.sha256


def test_long_lines_take_part_in_training(tmp_path: Path) -> None:
    """SentencePiece would silently skip a line of this length."""
    words = ["aardvark", "zymurgy", "quixotic"]
    line = " ".join(random.Random(0).choices(words, k=20_000))
    tokenizer = train_tokenizer([line], 300, tmp_path / "tokenizer.model")
    assert all(len(tokenizer.encode(word)) == 1 for word in words)


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (5000, r"vocab_size=5000 is too large for this text, which supports at most \d+"),
        (270, r"vocab_size=270 must be at least \d+: 256 bytes"),
        (259, r"vocab_size=259 must exceed 259"),
        (-1, r"vocab_size=-1 must exceed 259"),
    ],
)
def test_a_vocabulary_that_does_not_fit(vocab_size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TEXTS, vocab_size, tmp_path / "tokenizer.model")
    assert list(tmp_path.iterdir()) == []


def test_the_largest_vocabulary_named_in_the_message_works(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most") as caught:
        train_tokenizer(TEXTS, 5000, tmp_path / "tokenizer.model")
    largest = int(str(caught.value).split("at most ")[1].split(";")[0])
    assert train_tokenizer(TEXTS, largest, tmp_path / "tokenizer.model").vocab_size == largest


@pytest.mark.parametrize("texts", [[], ["", "\n\n"]])
def test_no_text_to_train_on(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer(texts, 300, tmp_path / "tokenizer.model")
