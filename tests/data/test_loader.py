import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data import shards
from mobilellm_jax.data.loader import train_batches, validation_batches
from tests.data.token_folders import windows_per_epoch

BOS, EOS = 1, 2


def documents(*lengths: int) -> list[list[int]]:
    """Writes documents of BOS, unique ids from 10 on, and EOS."""
    ids = itertools.count(10)
    return [[BOS, *itertools.islice(ids, n), EOS] for n in lengths]


def concat(seq_len: int, **changes: Any) -> DataConfig:
    return DataConfig(seq_len=seq_len, **changes)


def masked(seq_len: int, **changes: Any) -> DataConfig:
    return DataConfig(seq_len=seq_len, boundaries="document_mask", **changes)


def naive_window(docs: list[list[int]], data: DataConfig, window: int) -> dict[str, list[Any]]:
    """Writes one row, token by token, from the definition."""
    stream = [
        (number, token, at == 0) for number, d in enumerate(docs) for at, token in enumerate(d)
    ]
    row: dict[str, list[Any]] = {
        key: [] for key in ("tokens", "targets", "weights", "segments", "positions")
    }
    first = window * data.seq_len
    document, segment, position = None, 0, 0
    for at in range(first, first + data.seq_len):
        if at < len(stream):
            number, token, _ = stream[at]
            if number != document:
                document, segment, position = number, segment + 1, 0
        elif document != "padding":
            token, document, segment, position = 0, "padding", 0, 0
        has_target = at + 1 < len(stream)
        starts = has_target and stream[at + 1][2]
        counts = has_target and not (data.boundaries == "document_mask" and starts)
        row["tokens"].append(token if at < len(stream) else 0)
        row["targets"].append(stream[at + 1][1] if has_target else 0)
        row["weights"].append(1.0 if counts else 0.0)
        row["segments"].append(segment)
        row["positions"].append(position)
        position += 1
    return row


def rows_of(batch: dict[str, Any]) -> list[dict[str, list[Any]]]:
    return [
        {key: array[row].tolist() for key, array in batch.items()}
        for row in range(len(batch["tokens"]))
    ]


LENGTHS = [(5, 1, 0, 7, 30, 2), (0,), (1,), (3, 3), (13,), (0, 0, 0, 0, 0), (100, 1, 1, 1)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 300])
@pytest.mark.parametrize("shard_tokens", [1, 10, 1000])
def test_every_token_is_a_target_exactly_once_per_epoch(
    write_tokens: Any, lengths: tuple[int, ...], seq_len: int, shard_tokens: int
) -> None:
    docs = documents(*lengths)
    dataset = write_tokens(train=docs, shard_tokens=shard_tokens)
    stream = [token for document in docs for token in document]
    windows = windows_per_epoch(dataset, "train", seq_len)
    for data, expected in (
        (concat(seq_len), stream[1:]),
        (masked(seq_len), [token for document in docs for token in document[1:]]),
    ):
        batches = train_batches(
            dataset, data, global_batch=1, first_sample=windows, num_batches=windows
        )
        targets: Counter[int] = Counter()
        for batch in batches:
            targets.update(batch["targets"][batch["weights"] == 1].tolist())
            assert set(batch["weights"].flatten().tolist()) <= {0.0, 1.0}
        assert targets == Counter(expected)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("seq_len", [1, 4, 9, 200])
@pytest.mark.parametrize("make", [concat, masked])
def test_validation_windows_equal_the_naive_ones_in_order(
    write_tokens: Any, lengths: tuple[int, ...], seq_len: int, make: Any
) -> None:
    docs, data = documents(*lengths), make(seq_len)
    dataset = write_tokens(validation=docs, shard_tokens=6)
    windows = windows_per_epoch(dataset, "validation", seq_len)
    batches = list(validation_batches(dataset, data, batch=3))
    rows = [row for batch in batches for row in rows_of(batch)]
    assert len(batches) == -(-windows // 3)
    assert {batch["tokens"].shape for batch in batches} == {(3, seq_len)}
    for window, row in enumerate(rows):
        expected = naive_window(docs if window < windows else [], data, window)
        if data.boundaries == "concat":
            assert row.keys() == {"tokens", "targets", "weights"}
        assert row == {key: expected[key] for key in row}


def test_a_window_with_document_borders_by_hand(write_tokens: Any) -> None:
    dataset = write_tokens(validation=[[1, 10, 11, 2], [1, 2], [1, 12, 2]])
    (batch,) = validation_batches(dataset, masked(5), batch=2)
    assert rows_of(batch) == [
        {
            "tokens": [1, 10, 11, 2, 1],
            "targets": [10, 11, 2, 1, 2],
            "weights": [1, 1, 1, 0, 1],
            "segments": [1, 1, 1, 1, 2],
            "positions": [0, 1, 2, 3, 0],
        },
        {
            "tokens": [2, 1, 12, 2, 0],
            "targets": [1, 12, 2, 0, 0],
            "weights": [0, 1, 1, 0, 0],
            "segments": [1, 2, 2, 2, 0],
            "positions": [0, 0, 1, 2, 0],
        },
    ]
    assert {key: str(array.dtype) for key, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "weights": "float32",
        "segments": "int32",
        "positions": "int32",
    }


@pytest.mark.parametrize("make", [concat, masked])
def test_training_rows_are_the_naive_windows_in_another_order(write_tokens: Any, make: Any) -> None:
    docs, data = documents(20, 3, 17, 40, 1), make(6)
    dataset = write_tokens(train=docs, shard_tokens=30)
    windows = windows_per_epoch(dataset, "train", 6)
    (batch,) = train_batches(dataset, data, global_batch=windows, first_sample=0, num_batches=1)
    naive = [naive_window(docs, data, window) for window in range(windows)]
    rows = rows_of(batch)
    in_order = [{key: row[key] for key in rows[0]} for row in naive]
    assert rows != in_order
    assert sorted(rows, key=str) == sorted(in_order, key=str)


@pytest.mark.parametrize("make", [concat, masked])
def test_the_order_depends_on_the_sample_index_alone(write_tokens: Any, make: Any) -> None:
    """Tests any start, any batch size and any split into hosts' rows, past the ends of epochs."""
    dataset = write_tokens(train=documents(20, 3, 17, 40, 1), shard_tokens=30)
    data = make(6, seed=7)
    assert windows_per_epoch(dataset, "train", 6) == 15  # no batch size below divides an epoch

    def rows(first: int, batch: int, count: int, part: slice | None = None) -> list[Any]:
        batches = train_batches(
            dataset, data, global_batch=batch, first_sample=first, num_batches=count, rows=part
        )
        return [row for b in batches for row in rows_of(b)]

    whole = rows(0, 1, 64)
    assert rows(0, 4, 16) == whole
    assert rows(0, 64, 1) == whole
    for first in (1, 14, 15, 16, 31):
        assert rows(first, 3, 5) == whole[first : first + 15]
    hosts = [rows(8, 8, 3, slice(0, 3)), rows(8, 8, 3, slice(3, 8))]
    joined = [
        row for b in range(3) for row in hosts[0][3 * b : 3 * b + 3] + hosts[1][5 * b : 5 * b + 5]
    ]
    assert joined == whole[8:32]


def test_epochs_and_seeds_have_orders_of_their_own(write_tokens: Any) -> None:
    dataset = write_tokens(train=documents(200))

    def first_tokens(seed: int, epoch: int) -> tuple[int, ...]:
        windows = windows_per_epoch(dataset, "train", 4)
        (batch,) = train_batches(
            dataset,
            concat(4, seed=seed),
            global_batch=windows,
            first_sample=epoch * windows,
            num_batches=1,
        )
        return tuple(batch["tokens"][:, 0].tolist())

    orders = {(seed, epoch): first_tokens(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1


def test_training_goes_on_without_end(write_tokens: Any) -> None:
    dataset = write_tokens(train=documents(5))
    batches = train_batches(dataset, concat(3), global_batch=2, first_sample=10**12)
    assert sum(1 for _ in itertools.islice(batches, 50)) == 50


def test_validation_stops_at_num_batches_or_at_the_end(write_tokens: Any) -> None:
    dataset = write_tokens(validation=documents(38))  # 40 tokens, 10 windows of 4

    def count(num_batches: int | None) -> int:
        return len(list(validation_batches(dataset, concat(4), batch=4, num_batches=num_batches)))

    assert [count(n) for n in (None, 2, 99)] == [3, 2, 3]


def test_hosts_feed_the_rows_of_one_validation_batch(write_tokens: Any) -> None:
    dataset = write_tokens(validation=documents(38))
    whole = list(validation_batches(dataset, concat(4), batch=4))
    for part in (slice(0, 1), slice(1, 4)):
        for batch, mine in zip(
            whole, validation_batches(dataset, concat(4), batch=4, rows=part), strict=True
        ):
            np.testing.assert_array_equal(batch["tokens"][part], mine["tokens"])
            np.testing.assert_array_equal(batch["weights"][part], mine["weights"])


def test_ids_beyond_uint16(write_tokens: Any) -> None:
    dataset = write_tokens(validation=[[1, 70_000, 65_535, 2]], vocab_size=80_000)
    (batch,) = validation_batches(dataset, concat(3), batch=1)
    assert batch["targets"].tolist() == [[70_000, 65_535, 2]]


def test_a_split_without_targets_is_refused(write_tokens: Any) -> None:
    dataset: shards.Dataset = write_tokens(train=[[1]])
    with pytest.raises(ValueError, match=r"'train' has 1 tokens, but predicting one takes"):
        train_batches(dataset, concat(4), global_batch=1, first_sample=0)
    with pytest.raises(ValueError, match=r"'validation' has 0 tokens.*validation_fraction"):
        validation_batches(dataset, concat(4), batch=1)
