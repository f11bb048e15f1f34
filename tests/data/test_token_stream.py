import itertools
import resource
from typing import Any

import numpy as np
import pytest

from mobilellm_jax.data import token_stream

DOCUMENTS = [[1, 10, 11, 2], [1, 2], [1, 12, 13, 14, 2], [1, 15, 2], [1, 16, 17, 18, 19, 20, 2]]
STREAM = [token for document in DOCUMENTS for token in document]
STARTS = [0, 4, 6, 11, 14]
RANGES = [(start, stop) for start in range(22) for stop in range(start, 22)]


@pytest.mark.parametrize("shard_tokens", [1, 6, 8, 100])
def test_every_range_of_the_stream(write_tokens: Any, shard_tokens: int) -> None:
    stream = write_tokens(train=DOCUMENTS, shard_tokens=shard_tokens).splits["train"]
    assert (stream.tokens, stream.documents) == (21, 5)
    for start, stop in RANGES:
        assert stream.read(start, stop).tolist() == STREAM[start:stop]
        starts = [s for s in STARTS if start <= s < stop]
        assert stream.document_starts(start, stop).tolist() == starts
        assert stream.loss_mask(start, stop) is None


@pytest.mark.parametrize("shard_tokens", [1, 6, 100])
def test_every_range_of_a_view_of_a_view(write_tokens: Any, shard_tokens: int) -> None:
    whole = write_tokens(train=DOCUMENTS, shard_tokens=shard_tokens).splits["train"]
    view = whole.view(4, 21, 4).view(2, 10, 2)  # documents 2 and 3, tokens 6 to 13
    assert (view.tokens, view.documents) == (8, 2)
    for start, stop in itertools.combinations(range(9), 2):
        assert view.read(start, stop).tolist() == STREAM[6:14][start:stop]
        starts = [s for s in (0, 5) if start <= s < stop]
        assert view.document_starts(start, stop).tolist() == starts


@pytest.mark.parametrize("shard_tokens", [1, 6, 8, 100])
def test_the_loss_mask_of_every_range(write_tokens: Any, shard_tokens: int) -> None:
    masks = [[i % 3 == 0 for i, _ in enumerate(d)] for d in DOCUMENTS]
    flat = [int(m) for mask in masks for m in mask]
    stream = write_tokens(
        train=DOCUMENTS, shard_tokens=shard_tokens, loss_masks={"train": masks}
    ).splits["train"]
    assert stream.has_loss_mask
    for start, stop in RANGES:
        assert stream.loss_mask(start, stop).tolist() == flat[start:stop]


def test_more_shards_than_the_process_may_open(
    write_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The soft limit is raised to the maximum. Beyond that, shards are mapped again when needed."""
    documents = [[1, 10 + i, 2] for i in range(400)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(token_stream, "_FILES_LEFT_FREE", 60)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (120, hard))
        stream = write_tokens(train=documents, shard_tokens=1).splits["train"]
        raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised == min(hard, 400 * 3 + 60)
        monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
        monkeypatch.setattr(resource, "getrlimit", lambda _: (120, 120))
        assert token_stream._shards_open_at_once(400) == 20
        monkeypatch.undo()
        for _ in range(2):
            everything = np.concatenate([stream.read(i, i + 3) for i in range(0, 1200, 3)])
            assert everything.tolist() == [token for d in documents for token in d]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
