"""Counts the ids and the document lengths of a token stream in one pass."""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.data.token_stream import TokenStream
from mobilellm_jax.errors import UserError

# Number of tokens that are counted in one step. Counting needs a few arrays with 8 bytes per token.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The number of documents of each length; lengths are in tokens and in ascending order."""

    lengths: NDArray[np.int64]
    documents: NDArray[np.int64]

    def __add__(self, other: "Lengths") -> "Lengths":
        lengths, at = np.unique(np.concatenate([self.lengths, other.lengths]), return_inverse=True)
        documents = np.zeros(len(lengths), np.int64)
        np.add.at(documents, at, np.concatenate([self.documents, other.documents]))
        return Lengths(lengths, documents)

    @property
    def mean(self) -> float:
        """Mean number of tokens per document, or 0 if there are no documents."""
        return float(self.lengths @ self.documents) / max(1, int(self.documents.sum()))

    @property
    def median(self) -> float:
        """The median length; for an even number of documents, the mean of the middle two."""
        upto = np.cumsum(self.documents)
        if not len(upto):
            return 0.0
        middle = [(int(upto[-1]) - 1) // 2, int(upto[-1]) // 2]
        return float(self.lengths[np.searchsorted(upto, middle, side="right")].mean())

    def by_doubling(self) -> list[tuple[int, int]]:
        """Returns (2^k, number of documents with 2^k to 2^(k+1) - 1 tokens) in the order of k."""
        if not len(self.lengths):
            return []
        exponents = np.frexp(self.lengths.astype(np.float64))[1] - 1  # Exact, unlike a logarithm.
        counts = np.bincount(exponents, self.documents)
        return [(1 << k, int(counts[k])) for k in range(int(exponents[0]), len(counts))]


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """The lengths of documents, and in `of_id` the number of occurrences of each id."""

    of_id: NDArray[np.int64]
    lengths: Lengths

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(self.of_id + other.of_id, self.lengths + other.lengths)

    @property
    def tokens(self) -> int:
        """Number of all tokens, including BOS and EOS."""
        return int(self.of_id.sum())


def no_tokens(vocab_size: int) -> TokenCounts:
    """Returns the counts of an empty stream."""
    nothing = np.empty(0, np.int64)
    return TokenCounts(np.zeros(vocab_size, np.int64), Lengths(nothing, nothing))


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
        counts += TokenCounts(of_id, Lengths(*np.unique(np.diff(border), return_counts=True)))
        progress(stop - start)
    return counts
