"""Merges sequences into prefix trees, so that the model computes a common beginning once.

The endings of a question continue one context, and the two sentences of a WinoGrande pair are equal
up to the word in which they differ. A prefix tree holds such a beginning once. Its tokens are in
preorder: the descendants of token s are the tokens s + 1 ... end(s) - 1. Token t sees token s if
s <= t < end(s), and its position is its depth. With this mask, one forward pass over the tree gives
each branch the result of its own pass.

The mask also separates trees in the same row. If no tree of a batch branches, the places of the
ends serve as document numbers (`segments`), because attention within documents is faster than
attention with a mask. Row lengths are powers of two from 256 on, so few programs are compiled. Rows
have 15% more tokens than the trees on 600 rows of HellaSwag, 13% more on BoolQ and 9% more on PIQA.
One row per tree would waste as much and need 12 to 18 lengths.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.errors import UserError
from mobilellm_jax.generation.text_stream import common_prefix

_SHORTEST_ROW = 256
# A token costs about as much as this number of attention scores. In a block of MobileLLM-125M a
# token takes 7 million operations and a score 2304, at a third of the speed on a CPU.
_SCORES_PER_TOKEN = 1000
_SHARES = (8, 4, 2, 1)  # numbers of scored tokens per row, as divisors of the row's length


@dataclasses.dataclass(frozen=True)
class Query:
    """A sequence that the model reads, and the targets after its last tokens."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]  # the last target follows the whole sequence


def make_query(context: Sequence[int], continuation: Sequence[int], max_len: int) -> Query:
    """Returns the query for a continuation's likelihood; a long context loses its beginning.

    All tokens of the continuation are scored. The model reads at most `max_len` tokens.

    Raises:
      UserError: if context or continuation is empty, or the continuation is too long.
    """
    if not context or not continuation:
        missing = "context" if not context else "continuation"
        raise UserError(f"A request to score has no tokens in its {missing}.")
    if len(continuation) > max_len:
        raise UserError(
            f"A continuation of {len(continuation)} tokens is longer than "
            f"model.max_seq_len={max_len}, so the model cannot score it; leave the task out."
        )
    read = [*context, *continuation][-(max_len + 1) : -1]
    return Query(tuple(read), tuple(continuation))


@dataclasses.dataclass
class Tree:
    """Queries merged by their common beginnings, with tokens in preorder."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)  # end of each token's descendants
    sources: list[int] = dataclasses.field(default_factory=list)  # token before each target
    targets: list[int] = dataclasses.field(default_factory=list)
    queries: list[int] = dataclasses.field(default_factory=list)  # numbers, in order of `targets`
    lengths: list[int] = dataclasses.field(default_factory=list)  # targets of each query

    @property
    def size(self) -> int:
        """The number of places that the tree takes in a row."""
        return max(len(self.tokens), len(self.targets))


def grow_trees(queries: Sequence[Query], max_size: int) -> list[Tree]:
    """Returns trees of at most `max_size` places that hold every query once.

    Merging saves the shared tokens but adds attention between branches, which is computed and then
    masked. Two queries are merged if that is cheaper.
    """
    # After sorting by tokens, queries with a common beginning stand next to each other.
    order = sorted(range(len(queries)), key=lambda i: queries[i].tokens)
    trees: list[Tree] = []
    path: list[int] = []  # places of the last query's tokens in the last tree
    before: tuple[int, ...] = ()
    for number in order:
        query = queries[number]
        shared = common_prefix(before, query.tokens)
        if not trees or not _worth_merging(trees[-1], query, shared, max_size):
            trees.append(Tree())
            path, shared = [], 0
        tree = trees[-1]
        new = range(len(tree.tokens), len(tree.tokens) + len(query.tokens) - shared)
        tree.tokens += query.tokens[shared:]
        tree.positions += range(shared, len(query.tokens))
        tree.ends += [0] * len(new)
        path = [*path[:shared], *new]
        for place in path:
            tree.ends[place] = len(tree.tokens)
        tree.sources += path[-len(query.targets) :]
        tree.targets += query.targets
        tree.queries.append(number)
        tree.lengths.append(len(query.targets))
        before = query.tokens
    return trees


def _worth_merging(tree: Tree, query: Query, shared: int, max_size: int) -> bool:
    apart, alone = len(tree.tokens), len(query.tokens)
    together = apart + alone - shared
    if max(together, len(tree.targets) + len(query.targets)) > max_size:
        return False
    return together**2 - apart**2 - alone**2 <= _SCORES_PER_TOKEN * shared


@dataclasses.dataclass
class Row:
    """Trees that share a row of `length` tokens."""

    length: int
    trees: list[Tree]

    @property
    def scored(self) -> int:
        return sum(len(tree.targets) for tree in self.trees)


def pack_rows(trees: Sequence[Tree], multiple: int = 1) -> list[Row]:
    """Puts trees into rows, the largest first, each into the row with the least sufficient room.

    The length of every row is a multiple of `multiple`.
    """
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (free places, row), ascending
    for tree in sorted(trees, key=lambda tree: -tree.size):
        found = bisect.bisect_left(room, (tree.size, -1))
        if found == len(room):
            length = max(_SHORTEST_ROW, 1 << (tree.size - 1).bit_length())
            length = -(-length // multiple) * multiple
            free, row = length, len(rows)
            rows.append(Row(length, []))
        else:
            free, row = room.pop(found)
        rows[row].trees.append(tree)
        bisect.insort(room, (free - tree.size, row))
    return rows


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows as arrays, and the places of the queries' targets in them."""

    # tokens, positions and ends or segments are [B T]; sources and targets are [B S]
    arrays: dict[str, NDArray[np.int32]]
    spans: list[tuple[int, int, int, int]]  # query, row, start and stop of its targets in the row

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of rows, tokens per row, scored tokens per row."""
        return *self.arrays["tokens"].shape, self.arrays["targets"].shape[1]


def make_batches(rows: Sequence[Row], batch_tokens: int, multiple: int) -> Iterator[Batch]:
    """Yields batches of rows with one length, the longest first, so that memory fails early.

    A batch has about `batch_tokens` tokens. Empty rows make its number of rows a multiple of
    `multiple`.
    """
    # A batch is padded to its largest number of scored tokens, so similar rows stand together.
    ordered = sorted(rows, key=lambda row: (-row.length, -row.scored))
    for length, alike in itertools.groupby(ordered, key=lambda row: row.length):
        size = max(1, batch_tokens // length // multiple) * multiple
        left = list(alike)
        while left:
            batch, left = left[:size], left[size:]
            # The last batch of a length gets a smaller power of two instead of many empty rows.
            count = multiple
            while count < len(batch):
                count *= 2
            yield _as_arrays(batch, length, min(count, size))


def _as_arrays(rows: Sequence[Row], length: int, count: int) -> Batch:
    scored = max(row.scored for row in rows)
    scored = min(size for d in _SHARES if (size := -(-length // d)) >= scored)
    tokens_BT, positions_BT = np.zeros((2, count, length), np.int32)
    sources_BS, targets_BS = np.zeros((2, count, scored), np.int32)
    # Padding sees only itself.
    ends_BT = np.tile(np.arange(1, length + 1, dtype=np.int32), (count, 1))
    is_chain = True
    spans = []
    for b, row in enumerate(rows):
        t = s = 0
        for tree in row.trees:
            here = slice(t, t + len(tree.tokens))
            tokens_BT[b, here] = tree.tokens
            positions_BT[b, here] = tree.positions
            ends_BT[b, here] = np.asarray(tree.ends) + t
            is_chain &= min(tree.ends) == len(tree.tokens)
            there = slice(s, s + len(tree.targets))
            sources_BS[b, there] = np.asarray(tree.sources) + t
            targets_BS[b, there] = tree.targets
            for query, targets in zip(tree.queries, tree.lengths, strict=True):
                spans.append((query, b, s, s + targets))
                s += targets
            t = here.stop
    arrays = {"tokens": tokens_BT, "positions": positions_BT}
    arrays["segments" if is_chain else "ends"] = ends_BT
    return Batch({**arrays, "sources": sources_BS, "targets": targets_BS}, spans)
