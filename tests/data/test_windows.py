"""Loss masks in windows, and the count of targets; `test_loader.py` has the windows themselves."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data import windows
from mobilellm_jax.data.loader import train_batches, validation_batches
from mobilellm_jax.data.windows import count_targets, count_windows
from tests.data.token_folders import windows_per_epoch


def documents(*lengths: int) -> list[list[int]]:
    """Unique ids, the first and last of each document included."""
    ids = itertools.count(10)
    return [list(itertools.islice(ids, n)) for n in lengths]


def masks(seed: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2, n).tolist() for n in lengths]


LENGTHS = (7, 2, 2, 19, 3, 40, 2)  # 75 tokens


@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
@pytest.mark.parametrize("seq_len", [1, 5, 37, 74, 75, 200])
@pytest.mark.parametrize("masked", [True, False])
def test_every_target_exactly_once_in_each_of_three_epochs(
    write_tokens: Any, seq_len: int, boundaries: Any, masked: bool
) -> None:
    docs, mask = documents(*LENGTHS), masks(0, *LENGTHS)
    dataset = write_tokens(
        train=docs, loss_masks={"train": mask} if masked else None, shard_tokens=20
    )
    counts = [m if masked else [1] * len(m) for m in mask]
    stream = [
        (token, counted, at == 0)
        for document, of_document in zip(docs, counts, strict=True)
        for at, (token, counted) in enumerate(zip(document, of_document, strict=True))
    ]
    expected = [
        token
        for at, (token, counted, starts) in enumerate(stream)
        if counted and at > 0 and not (starts and boundaries == "document_mask")
    ]
    data = DataConfig(seq_len=seq_len, boundaries=boundaries)
    per_epoch = windows_per_epoch(dataset, "train", seq_len)
    found: Counter[int] = Counter()
    # Four rows at a time and three epochs: batches that lie in two epochs, where there are several.
    batches = -(-3 * per_epoch // 4)
    rows = 0
    for batch in train_batches(dataset, data, global_batch=4, first_sample=0, num_batches=batches):
        keep = min(4, 3 * per_epoch - rows)
        rows += keep
        found.update(batch["targets"][:keep][batch["weights"][:keep] == 1].tolist())
    assert found == Counter({token: 3 for token in expected})
    assert count_targets(dataset.splits["train"], boundaries) == len(expected)


@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
def test_masked_targets_stay_inputs(write_tokens: Any, boundaries: Any) -> None:
    docs = [[1, 10, 11, 2], [1, 12, 2]]
    mask = [[0, 0, 1, 0], [1, 0, 1]]
    dataset = write_tokens(validation=docs, loss_masks={"validation": mask})
    data = DataConfig(seq_len=4, boundaries=boundaries)
    (batch,) = validation_batches(dataset, data, batch=2)
    assert batch["tokens"].tolist() == [[1, 10, 11, 2], [1, 12, 2, 0]]
    assert batch["targets"].tolist() == [[10, 11, 2, 1], [12, 2, 0, 0]]
    across = 0 if boundaries == "document_mask" else 1
    assert batch["weights"].tolist() == [[0, 1, 0, across], [0, 1, 0, 0]]


@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
def test_targets_are_counted_in_chunks(
    write_tokens: Any, boundaries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_tokens(
        train=documents(*LENGTHS), loss_masks={"train": masks(3, *LENGTHS)}, shard_tokens=20
    )
    stream = dataset.splits["train"]
    whole = count_targets(stream, boundaries)
    assert 10 < whole < 65
    for chunk in (1, 7, 75):
        monkeypatch.setattr(windows, "_CHUNK", chunk)
        assert count_targets(stream, boundaries) == whole


def test_windows_are_counted_with_the_last_one(write_tokens: Any) -> None:
    stream = write_tokens(train=documents(*LENGTHS)).splits["train"]
    assert [count_windows(stream, n) for n in (1, 37, 73, 74, 75)] == [74, 2, 2, 1, 1]
