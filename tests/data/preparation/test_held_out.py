import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax.data.preparation.cutting import HeldOut
from mobilellm_jax.data.preparation.held_out import choose_held_out, tokenizer_sample
from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import BadLine, BadLineError, Document, Piece, Source, stop

DIGESTS = 1 << 64


class Listed(Source):
    """A source of texts in pieces that remembers which pieces were read."""

    def __init__(self, pieces: Sequence[Sequence[str]], splits: tuple[str, ...] = ("train",)):
        super().__init__("listed")
        self._pieces = pieces
        self._splits = splits
        self.read: list[int] = []

    def identity(self) -> str:
        return "listed"

    def splits(self) -> tuple[str, ...]:
        return self._splits

    def pieces(self, split: str) -> list[Piece]:
        return [
            Piece("listed", split, sum(map(len, texts)), (i,))
            for i, texts in enumerate(self._pieces)
        ]

    def documents(self, piece: Piece, on_bad: Any) -> Iterator[Document]:
        (index,) = piece.where
        self.read.append(index)
        for text in self._pieces[index]:
            yield Document("listed", text)


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def test_reading_ends_where_both_sides_have_a_document() -> None:
    texts = [f"document {i}" for i in range(1000)]
    source = Listed([[text] for text in texts])
    threshold = choose_held_out([source], 0.1, stop).below
    assert threshold == int(0.1 * DIGESTS)
    first = next(i for i, text in enumerate(texts) if digest(text) < threshold)
    assert source.read == list(range(max(first, 1) + 1))
    assert len(source.read) < 100


@pytest.mark.parametrize(("fraction", "held"), [(1e-9, 1), (1 - 1e-9, 2)])
def test_few_documents_are_on_both_sides(fraction: float, held: int) -> None:
    texts = ["one", "two", "", "three"]
    threshold = choose_held_out([Listed([texts])], fraction, stop).below
    assert sum(digest(text) < threshold for text in texts if text) == held


def test_none_is_held_out() -> None:
    assert choose_held_out([Listed([["one", "two"]])], 0.0, stop) == HeldOut(0)
    own = Listed([["one", "two"]], ("train", "validation"))
    assert choose_held_out([own], 0.5, stop) == HeldOut(0)
    assert own.read == []
    assert choose_held_out([own, Listed([["one"]])], 0.5, stop) == HeldOut(0)
    assert choose_held_out([Listed([[""]])], 0.5, stop) == HeldOut(0)
    with pytest.raises(ValueError, match="cannot be held out of a single document"):
        choose_held_out([Listed([["1"]])], 0.5, stop)


def test_bad_lines_are_left_to_the_caller(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{}\n{"text": "two"}\n')
    source = open_source(f"jsonl:{tmp_path}/a.jsonl", tmp_path)
    bad: list[BadLine] = []
    assert 0 < choose_held_out([source], 1e-9, bad.append).below < DIGESTS
    assert [line.line for line in bad] == [2]
    with pytest.raises(BadLineError):
        choose_held_out([source], 1e-9, stop)


def sample(listed: Sequence[Listed], **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"weights": None, "held_out": HeldOut(0), "most_characters": 10**6}
    settings |= changes
    return list(tokenizer_sample(listed, on_bad=stop, **settings))


def test_a_small_source_gives_all_but_what_is_held_out() -> None:
    texts = [[f"text {i} {j}" for j in range(5)] for i in range(9)]
    flat = [text for piece in texts for text in piece]
    assert sample([Listed(texts[:4]), Listed(texts[4:])]) == flat
    half = 1 << 63
    kept = [text for text in flat if digest(text) >= half]
    assert sample([Listed(texts)], held_out=HeldOut(half)) == kept != flat
    own = Listed(texts, ("train", "validation"))
    assert sample([own], held_out=HeldOut(half)) == flat


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_a_large_source_gives_its_share_from_all_over(pieces: int) -> None:
    rng = random.Random(0)
    texts = [
        [f"{i:04d} " * rng.randrange(1, 9) for _ in range(900 // pieces + 1)] for i in range(pieces)
    ]
    total = sum(len(text) for piece in texts for text in piece)
    listed = Listed(texts)
    found = sample([listed], most_characters=total // 10)
    assert 0.9 * (total // 10) < sum(map(len, found)) <= total // 10
    assert len(listed.read) == min(pieces, 256)
    assert max(listed.read) >= 0.99 * (pieces - 1)


def test_weights_set_the_shares_and_one_long_document_is_cut() -> None:
    long, short = Listed([["x" * 10**6]]), Listed([["y" * 10**5] * 10])
    found = "".join(sample([long, short], weights=[1.0, 3.0], most_characters=4_000))
    assert (found.count("x"), found.count("y")) == (1_000, 3_000)
