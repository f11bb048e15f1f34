import itertools

import numpy as np
import pytest

from mobilellm_jax.evaluate.prefix_trees import (
    Query,
    Row,
    Tree,
    grow_trees,
    make_batches,
    make_query,
    pack_rows,
)


def some_queries(seed: int, count: int = 300) -> list[Query]:
    """Returns contexts with several endings, some equal and some that continue another one."""
    rng = np.random.default_rng(seed)
    queries = []
    while len(queries) < count:
        context = rng.integers(0, 6, rng.integers(1, 60)).tolist()
        for _ in range(rng.integers(1, 5)):
            ending = rng.integers(0, 6, rng.integers(1, 30)).tolist()
            queries.append(make_query(context, ending, 128))
        queries.append(queries[-1])
        # The first ending continues the last one, and the second ending has a single token.
        queries.append(make_query(context, [*ending, 3], 128))
        queries.append(make_query(context, [int(rng.integers(0, 6))], 128))
    return queries


def read_off(row: Row) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns the tokens that each query's last token sees through the mask, and its targets."""
    [batch] = make_batches([row], 1, 1)
    mask = "ends" if "ends" in batch.arrays else "segments"
    tokens, ends, positions = (batch.arrays[name][0] for name in ("tokens", mask, "positions"))
    sources, targets = batch.arrays["sources"][0], batch.arrays["targets"][0]
    found = {}
    for query, _, start, stop in batch.spans:
        seen = [[s for s in range(t + 1) if t < ends[s]] for t in sources[start:stop]]
        for t, places in zip(sources[start:stop], seen, strict=True):
            assert positions[places].tolist() == list(range(len(places)))
            assert places[-1] == t
        for shorter, longer in itertools.pairwise(seen):
            assert longer[:-1] == shorter
        found[query] = (tuple(tokens[seen[-1]].tolist()), tuple(targets[start:stop].tolist()))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_mask_shows_each_query_its_own_tokens(seed: int) -> None:
    queries = some_queries(seed)
    rows = pack_rows(grow_trees(queries, 300))
    found = {}
    for row in rows:
        found |= read_off(row)
    assert found == {i: (query.tokens, query.targets) for i, query in enumerate(queries)}
    places = sum(tree.size for row in rows for tree in row.trees)
    assert places < 0.7 * sum(len(query.tokens) for query in queries)


def test_a_common_beginning_is_stored_once() -> None:
    endings = [[9, 8], [9, 7, 7], [6]]
    queries = [make_query([1, 2, 3], ending, 128) for ending in endings]
    [tree] = grow_trees(queries, 128)
    # The last token of an ending is only a target. Two endings begin with the same token.
    assert tree.tokens == [1, 2, 3, 9, 7]
    assert tree.positions == [0, 1, 2, 3, 4]
    by_query = dict(zip(tree.queries, range(3), strict=True))
    starts = np.cumsum([0, *tree.lengths])
    scored = {
        query: [(tree.sources[i], tree.targets[i]) for i in range(starts[n], starts[n + 1])]
        for query, n in by_query.items()
    }
    assert scored == {0: [(2, 9), (3, 8)], 1: [(2, 9), (3, 7), (4, 7)], 2: [(2, 6)]}


def test_a_short_common_beginning_is_not_merged() -> None:
    tail = list(range(10, 60))
    for shared, trees in ((2, 2), (20, 1)):
        queries = [make_query([1] * shared + [n] + tail, [5], 128) for n in (2, 3)]
        assert len(grow_trees(queries, 512)) == trees


def test_trees_without_branches_are_documents() -> None:
    """Attention within documents needs no mask."""
    queries = [make_query([1, 2, 3], [9, 8, 7][:n], 128) for n in (1, 3)]
    queries.append(make_query([4] * 30, [5], 128))
    [row] = pack_rows(grow_trees(queries, 128))
    [batch] = make_batches([row], 1, 1)
    documents = batch.arrays["segments"][0]
    sizes = [len(tree.tokens) for tree in row.trees]
    assert sorted(sizes) == [5, 30]
    assert [len(set(part)) for part in np.split(documents[:35], [sizes[0]])] == [1, 1]
    assert len(set(documents)) == 2 + batch.shape[1] - 35  # padding sees only itself
    [row] = pack_rows(grow_trees([*queries, make_query([1, 2, 3], [6, 6], 128)], 128))
    assert "segments" not in next(make_batches([row], 1, 1)).arrays


def test_trees_keep_to_their_size() -> None:
    queries = [make_query([1] * 40, [n, 2, n], 128) for n in range(100)]
    trees = grow_trees(queries, 90)
    assert max(tree.size for tree in trees) <= 90
    assert len(trees) > 1
    # A continuation of one token takes no place of the tokens, but one place of the targets.
    trees = grow_trees([make_query([1], [n], 128) for n in range(100)], 30)
    assert [len(tree.targets) for tree in trees] == [30, 30, 30, 10]


def test_rows_are_powers_of_two_and_hold_every_tree_once() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 700, 200).tolist()
    trees = [Tree(tokens=[0] * size, targets=[0]) for size in sizes]
    rows = pack_rows(trees)
    assert sorted(len(t.tokens) for row in rows for t in row.trees) == sorted(sizes)
    assert {row.length for row in rows} == {256, 512, 1024}
    assert all(sum(t.size for t in row.trees) <= row.length for row in rows)
    assert sum(sizes) > 0.97 * sum(row.length for row in rows)
    assert {row.length for row in pack_rows(trees, 24)} == {264, 528, 1032}


def test_batches_have_few_shapes_and_hold_all_rows() -> None:
    queries = some_queries(3, 2000)
    rows = pack_rows(grow_trees(queries, 256))
    batches = list(make_batches(rows, 2048, 2))
    assert len(batches) > 10
    spans = [span for batch in batches for span in batch.spans]
    assert sorted(span[0] for span in spans) == list(range(len(queries)))
    assert {batch.shape[1] for batch in batches} == {256}
    assert all(count % 2 == 0 and count <= 8 for count, _, _ in (b.shape for b in batches))
    assert len({batch.shape for batch in batches}) <= 5
    # A single row is not padded to a full batch.
    [batch] = make_batches(rows[:1], 2048, 1)
    assert batch.shape[0] == 1


def test_rows_with_few_targets_are_batched_together() -> None:
    flat = [0] * 200
    rows = [Row(256, [Tree(flat, flat, flat, flat[:n], flat[:n])]) for n in [20, 120] * 8]
    shapes = [batch.shape for batch in make_batches(rows, 2048, 1)]
    assert shapes == [(8, 256, 128), (8, 256, 32)]


def test_a_long_context_loses_its_beginning() -> None:
    query = make_query(range(10), [20, 21, 22], 6)
    assert query == Query((6, 7, 8, 9, 20, 21), (20, 21, 22))
    assert make_query([1], range(6), 6) == Query((1, 0, 1, 2, 3, 4), tuple(range(6)))
    # The model does not read the last token, so a sequence may have one token more.
    assert make_query(range(4), [20, 21, 22], 6).tokens == (0, 1, 2, 3, 20, 21)


def test_a_continuation_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"7 tokens is longer than model.max_seq_len=6"):
        make_query([1], range(7), 6)
    with pytest.raises(ValueError, match="no tokens in its context"):
        make_query([], [1], 6)
    with pytest.raises(ValueError, match="no tokens in its continuation"):
        make_query([1], [], 6)
