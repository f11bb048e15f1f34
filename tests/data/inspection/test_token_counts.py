import random
import statistics
from collections import Counter

import pytest

from mobilellm_jax.data.inspection import token_counts
from mobilellm_jax.data.inspection.token_counts import by_doubling, count_tokens, median, no_tokens
from tests.data.conftest import WriteTokens


def random_documents(seed: int, vocab_size: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 2, 5, 6, 14, 30, 100]) for _ in range(count)]
    return [[1, *(rng.randrange(3, vocab_size) for _ in range(length)), 2] for length in lengths]


@pytest.mark.parametrize("vocab_size", [50, 70_000])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 22])
def test_counts_are_those_of_a_counter(
    chunk: int, vocab_size: int, write_tokens: WriteTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_counts, "_CHUNK", chunk)
    documents = random_documents(chunk, vocab_size, 41)
    dataset = write_tokens(
        train=documents,
        shard_tokens=200,
        vocab_size=vocab_size,
        sources=[("a", None, {"train": 23}), ("b", None, {"train": 18})],
    )
    assert len(dataset.manifest.splits["train"].shards) > 2
    told: list[int] = []
    for source, expected in ((0, documents[:23]), (1, documents[23:])):
        stream = dataset.source_stream("train", source)
        counts = count_tokens(stream, vocab_size, told.append)
        ids = Counter(i for document in expected for i in document)
        assert {i: n for i, n in enumerate(counts.of_id.tolist()) if n} == ids
        assert len(counts.of_id) == vocab_size
        assert counts.tokens == ids.total()
        assert counts.documents == Counter(map(len, expected))
        assert median(counts.documents) == statistics.median(map(len, expected))
    assert sum(told) == sum(map(len, documents))


def test_sums_are_the_counts_of_both(write_tokens: WriteTokens) -> None:
    documents = random_documents(3, 50, 40)
    dataset = write_tokens(
        train=documents, sources=[("a", None, {"train": 17}), ("b", None, {"train": 23})]
    )
    streams = [dataset.source_stream("train", 0), dataset.source_stream("train", 1)]
    parts = [count_tokens(stream, 50, lambda _: None) for stream in streams]
    whole = count_tokens(dataset.splits["train"], 50, lambda _: None)
    total = sum(parts, no_tokens(50))
    assert total.of_id.tolist() == whole.of_id.tolist()
    assert total.documents == whole.documents


def test_documents_are_binned_by_the_bits_of_their_length() -> None:
    documents = {3: 5, 4: 1, 7: 2, 31: 1, 32: 4, 2**40 - 1: 1, 2**40: 6}
    bins = Counter[int]()
    for length, count in documents.items():
        bins[1 << (length.bit_length() - 1)] += count
    expected = [(1 << k, bins[1 << k]) for k in range(1, 41)]
    assert by_doubling(Counter(documents)) == expected


def test_nothing_has_no_lengths() -> None:
    lengths = no_tokens(5).documents
    assert (median(lengths), by_doubling(lengths)) == (0, [])


def test_an_id_past_the_vocabulary_is_refused(write_tokens: WriteTokens) -> None:
    stream = write_tokens(train=[[1, 50, 2]], vocab_size=51).splits["train"]
    assert count_tokens(stream, 51, lambda _: None).of_id[50] == 1
    with pytest.raises(ValueError, match="Token id 50 occurs, but the tokenizer has only 50 ids"):
        count_tokens(stream, 50, lambda _: None)
