"""Merges sequences into prefix trees, so that the model reads a common beginning only once.

All answers to a multiple-choice question continue the same context. The two sentences of a
WinoGrande pair are equal up to the word in which they differ. A prefix tree holds such a common
beginning once. Its tokens are in preorder: the descendants of token s have the indices s + 1 ...
end(s) - 1. Token t attends to token s if s <= t < end(s), and the position of a token is its depth
in the tree. With this mask, one forward pass over the tree gives each sequence the same result as a
pass over this sequence alone.

The mask also separates the trees in a row. If no tree of a batch has branches, the end index is the
same for all tokens of a tree. These ends then serve as document numbers (`segments`), because
attention within documents is faster than attention with a mask. Row lengths are powers of two from
256 on, so few programs are compiled. On 600 rows of HellaSwag, the padded rows have 15% more tokens
than the trees. On BoolQ they have 13% more, and on PIQA 9% more. With one tree per row, the padding
would be about the same, but 12 to 18 row lengths would have to be compiled.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.data.tokenizers.tokenizer import common_prefix
from mobilellm_jax.errors import UserError

_SHORTEST_ROW = 256
# The number of attention scores that cost as much compute as one more token. In a block of
# MobileLLM-125M, a token needs 7 million operations and a score needs 2304. On a CPU, the
# operations of a score take about three times as long as those of a token.
_SCORES_PER_TOKEN = 1000
_SHARES = (8, 4, 2, 1)  # A row of T tokens has room for T / 8, T / 4, T / 2 or T targets.


@dataclasses.dataclass(frozen=True)
class Query:
    """A sequence that the model reads, and the target tokens to score at its last positions."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]  # The last target follows the whole sequence.


def make_query(context: Sequence[int], continuation: Sequence[int], max_len: int) -> Query:
    """Returns the query that scores a continuation; a long context loses its first tokens.

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
    """A prefix tree: queries that share their beginning, with the tokens in preorder."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)  # Index after each token's subtree.
    sources: list[int] = dataclasses.field(default_factory=list)  # Token that precedes each target.
    targets: list[int] = dataclasses.field(default_factory=list)
    queries: list[int] = dataclasses.field(default_factory=list)  # Numbers of the merged queries.
    lengths: list[int] = dataclasses.field(default_factory=list)  # Number of targets per query.

    @property
    def size(self) -> int:
        """The number of positions that the tree needs in a row."""
        return max(len(self.tokens), len(self.targets))


def grow_trees(queries: Sequence[Query], max_size: int) -> list[Tree]:
    """Merges queries into trees of at most `max_size` positions; every query is in one tree.

    After merging, the model reads the shared tokens once, but it also computes attention scores
    between branches, which the mask then hides. Queries are merged only if this is cheaper than
    separate trees.
    """
    # Sorting by tokens puts queries with a common beginning next to each other.
    order = sorted(range(len(queries)), key=lambda i: queries[i].tokens)
    trees: list[Tree] = []
    path: list[int] = []  # Indices of the last query's tokens in the last tree.
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
    """Puts trees into rows, largest trees first; each goes to the fullest row with enough room.

    The length of every row is a multiple of `multiple`.
    """
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # Pairs (free positions, row) in ascending order.
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
    """Rows of trees as arrays, and the location of the targets of each query."""

    # The shape of tokens, positions, ends and segments is [B T]; of sources and targets, [B S].
    arrays: dict[str, NDArray[np.int32]]
    spans: list[tuple[int, int, int, int]]  # Query, row, start and stop of its targets.

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of rows, of tokens per row, and of targets per row."""
        return *self.arrays["tokens"].shape, self.arrays["targets"].shape[1]


def make_batches(rows: Sequence[Row], batch_tokens: int, multiple: int) -> Iterator[Batch]:
    """Yields batches of rows of equal length, longest first, so that a lack of memory shows early.

    A batch has about `batch_tokens` tokens. Empty rows are added until the number of rows of the
    batch is a multiple of `multiple`.
    """
    # A batch is padded to its largest number of targets, so rows are sorted by that number too.
    ordered = sorted(rows, key=lambda row: (-row.length, -row.scored))
    for length, alike in itertools.groupby(ordered, key=lambda row: row.length):
        size = max(1, batch_tokens // length // multiple) * multiple
        left = list(alike)
        while left:
            batch, left = left[:size], left[size:]
            # A small last batch is padded to a power of two (times `multiple`), not to `size` rows.
            count = multiple
            while count < len(batch):
                count *= 2
            yield _as_arrays(batch, length, min(count, size))


def _as_arrays(rows: Sequence[Row], length: int, count: int) -> Batch:
    scored = max(row.scored for row in rows)
    scored = min(size for d in _SHARES if (size := -(-length // d)) >= scored)
    tokens_BT, positions_BT = np.zeros((2, count, length), np.int32)
    sources_BS, targets_BS = np.zeros((2, count, scored), np.int32)
    # A padding token attends only to itself.
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
