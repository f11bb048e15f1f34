"""Counts the ids and the document lengths of a token stream in one pass."""

import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.data.token_stream import TokenStream
from mobilellm_jax.errors import UserError

# Number of tokens that are counted in one step. Counting needs a few arrays with 8 bytes per token.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """How often each token id occurs (`of_id`), and how many documents have each length."""

    of_id: NDArray[np.int64]
    documents: Counter[int]

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(self.of_id + other.of_id, self.documents + other.documents)

    @property
    def tokens(self) -> int:
        """Number of all tokens, including BOS and EOS."""
        return int(self.of_id.sum())


def median(lengths: Counter[int]) -> float:
    """Returns the median length, or 0 if there are no documents.

    For an even number of documents, the median is the mean of the middle two.
    """
    if not lengths:
        return 0.0
    ordered = sorted(lengths)
    upto = list(itertools.accumulate(lengths[length] for length in ordered))
    low = bisect.bisect_right(upto, (upto[-1] - 1) // 2)
    high = bisect.bisect_right(upto, upto[-1] // 2)
    return (ordered[low] + ordered[high]) / 2


def by_doubling(lengths: Counter[int]) -> list[tuple[int, int]]:
    """Returns (2^k, number of documents with 2^k to 2^(k+1) - 1 tokens) in the order of k."""
    bins = Counter[int]()
    for length, documents in lengths.items():
        bins[length.bit_length() - 1] += documents
    return [(1 << k, bins[k]) for k in range(min(bins, default=0), max(bins, default=-1) + 1)]


def no_tokens(vocab_size: int) -> TokenCounts:
    """Returns the counts of an empty stream."""
    return TokenCounts(np.zeros(vocab_size, np.int64), Counter())


def count_tokens(
    stream: TokenStream, vocab_size: int, progress: Callable[[int], object]
) -> TokenCounts:
    """Counts a stream in bounded memory; calls `progress` with the number of tokens in each step.

    Raises:
      UserError: if an id is not below `vocab_size`.
    """
    counts = no_tokens(vocab_size)
    document = 0  # Start of the current document.
    for start in range(0, stream.tokens, _CHUNK):
        stop = min(start + _CHUNK, stream.tokens)
        of_id = np.bincount(stream.read(start, stop), minlength=vocab_size)
        if len(of_id) > vocab_size:
            raise UserError(
                f"Token id {len(of_id) - 1} occurs, but the tokenizer has only {vocab_size} ids; "
                "prepare the data again with the tokenizer that made the ids."
            )
        borders = [np.array([document]), stream.document_starts(max(start, 1), stop)]
        if stop == stream.tokens:
            borders.append(np.array([stop]))
        border = np.concatenate(borders)
        document = int(border[-1])
        counts += TokenCounts(of_id, Counter(np.diff(border).tolist()))
        progress(stop - start)
    return counts
