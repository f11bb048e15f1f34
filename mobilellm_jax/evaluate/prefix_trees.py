"""Sequences to score as prefix trees in rows of tokens, so that what they share is computed once.

The endings of a question continue one context, and the two sentences of a WinoGrande pair are one
up to the word in which they differ. In a prefix tree such a beginning stands once. Written down in
preorder, the descendants of the tree's token s are the tokens s + 1 ... end(s) - 1: token t sees s
if s <= t < end(s), and its position is its depth. So a whole tree takes one forward pass, under a
mask, and every branch gets what a pass of its own would give.

Trees of the same row do not see each other under that mask either. Rows have few lengths (powers of
two from 256 on), which is few programs to compile, and little of them stays empty: on 600 rows of
HellaSwag 15% more is computed than the trees themselves take, on BoolQ 13%, on PIQA 9%, as much as
with a row per tree in 12 to 18 lengths.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.errors import UserError

_SHORTEST_ROW = 256
# A token costs as much as about so many attention scores: 7 million operations in a block of
# MobileLLM-125M against 2304, which a CPU does at a third of the speed.
_SCORES_PER_TOKEN = 1000
_SHARES = (8, 4, 2, 1)  # of a row's tokens that are scored, as the divisors of its length


@dataclasses.dataclass(frozen=True)
class Query:
    """A sequence that the model reads, and what it should say after each of its last tokens."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]  # the last one follows the whole sequence


def make_query(context: Sequence[int], continuation: Sequence[int], max_len: int) -> Query:
    """Returns the query for the continuation's likelihood; of a long context, the end is read.

    Args:
      context: token ids, at least one.
      continuation: token ids to be scored, at least one.
      max_len: tokens that the model reads at once.

    Raises:
      UserError: if there is nothing to score, or more than fits.
    """
    if not context or not continuation:
        missing = "context" if not context else "continuation"
        raise UserError(f"A request to score has no tokens in its {missing}.")
    if len(continuation) > max_len:
        raise UserError(
            f"A continuation of {len(continuation)} tokens is longer than "
            f"model.max_seq_len={max_len}, so no single pass can score it; leave its task out."
        )
    read = [*context, *continuation][-(max_len + 1) : -1]
    return Query(tuple(read), tuple(continuation))


@dataclasses.dataclass
class Tree:
    """Queries merged by their common beginnings; the tokens are in preorder."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)  # where a token's descendants end
    sources: list[int] = dataclasses.field(default_factory=list)  # tokens after which is scored
    targets: list[int] = dataclasses.field(default_factory=list)  # what, for each of them
    queries: list[int] = dataclasses.field(default_factory=list)  # numbers, in order of `targets`
    lengths: list[int] = dataclasses.field(default_factory=list)  # of each one's targets

    @property
    def size(self) -> int:
        """The places that it takes in a row."""
        return max(len(self.tokens), len(self.targets))


def grow_trees(queries: Sequence[Query], max_size: int) -> list[Tree]:
    """Returns trees of at most `max_size` places that hold every query once.

    Queries are merged where that is cheaper: it saves the tokens that they share, and costs
    attention between branches, which is computed and then masked.
    """
    # In the order of their tokens, queries with a common beginning follow each other.
    order = sorted(range(len(queries)), key=lambda i: queries[i].tokens)
    trees: list[Tree] = []
    path: list[int] = []  # the last query's tokens, as places in the last tree
    before: tuple[int, ...] = ()
    for number in order:
        query = queries[number]
        shared = _common_beginning(before, query.tokens)
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


def _common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


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
    """Puts trees into rows, the largest first, each where it leaves the least room.

    Args:
      trees: to be placed.
      multiple: of which every row's length is one.
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
    """Rows as arrays, and where in them the queries' targets are."""

    arrays: dict[str, NDArray[np.int32]]  # tokens, positions, ends [B T]; sources, targets [B S]
    spans: list[tuple[int, int, int, int]]  # query, row, its first target there, the one after

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, tokens of a row, scored tokens of a row."""
        return *self.arrays["tokens"].shape, self.arrays["targets"].shape[1]


def make_batches(rows: Sequence[Row], batch_tokens: int, multiple: int) -> Iterator[Batch]:
    """Yields all rows in batches of one length, the longest first, so that memory fails early.

    Args:
      rows: to be grouped.
      batch_tokens: about so many at once.
      multiple: of which the rows of a batch are one; empty rows make up for those missing.
    """
    # Rows with as many scored tokens come together: those of a batch are padded to the most.
    ordered = sorted(rows, key=lambda row: (-row.length, -row.scored))
    for length, alike in itertools.groupby(ordered, key=lambda row: row.length):
        size = max(1, batch_tokens // length // multiple) * multiple
        left = list(alike)
        while left:
            batch, left = left[:size], left[size:]
            # The last batch of a length: another power of two rather than many empty rows.
            count = multiple
            while count < len(batch):
                count *= 2
            yield _as_arrays(batch, length, min(count, size))


def _as_arrays(rows: Sequence[Row], length: int, count: int) -> Batch:
    scored = max(row.scored for row in rows)
    scored = min(size for d in _SHARES if (size := -(-length // d)) >= scored)
    tokens_BT = np.zeros((count, length), np.int32)
    positions_BT = np.zeros((count, length), np.int32)
    ends_BT = np.tile(np.arange(1, length + 1, dtype=np.int32), (count, 1))  # each sees itself
    sources_BS, targets_BS = (np.zeros((count, scored), np.int32) for _ in range(2))
    spans = []
    for b, row in enumerate(rows):
        t = s = 0
        for tree in row.trees:
            here = slice(t, t + len(tree.tokens))
            tokens_BT[b, here] = tree.tokens
            positions_BT[b, here] = tree.positions
            ends_BT[b, here] = np.asarray(tree.ends) + t
            there = slice(s, s + len(tree.targets))
            sources_BS[b, there] = np.asarray(tree.sources) + t
            targets_BS[b, there] = tree.targets
            for query, targets in zip(tree.queries, tree.lengths, strict=True):
                spans.append((query, b, s, s + targets))
                s += targets
            t = here.stop
    return Batch(
        {
            "tokens": tokens_BT,
            "positions": positions_BT,
            "ends": ends_BT,
            "sources": sources_BS,
            "targets": targets_BS,
        },
        spans,
    )
