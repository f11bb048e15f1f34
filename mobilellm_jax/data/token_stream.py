"""The tokens of all shards of a split as one stream; the shards are mapped into memory."""

import bisect
import dataclasses
import functools
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.errors import UserError

TOKENS, OFFSETS, LOSS_MASK = "tokens", "offsets", "loss_mask"
OFFSET_DTYPE = np.dtype("<u8")
LOSS_MASK_DTYPE = np.dtype("u1")

_FILES_PER_SHARD = 3
# Number of files that the process may open for other purposes: checkpoints, logs, libraries,
# sockets.
_FILES_LEFT_FREE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and checksum of a file."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard: the files `name`.tokens, `name`.offsets and, if it has a mask, `name`.loss_mask."""

    name: str
    documents: int
    tokens: int
    files: Mapping[str, FileRecord]  # Records by suffix.


class _Arrays(NamedTuple):
    tokens: NDArray[Any]
    offsets: NDArray[np.uint64]
    loss_mask: NDArray[np.uint8] | None


class TokenStream:
    """A stream of `tokens` tokens in `documents` documents; `view` returns a part of the stream."""

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype[Any]) -> None:
        self.documents = sum(shard.documents for shard in shards)
        self.has_loss_mask = any(LOSS_MASK in shard.files for shard in shards)
        self._dtype = dtype
        self._folder, self._shards = folder, shards
        ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._bounds: list[int] = [0, *(int(end) for end in ends)]
        self._first, self.tokens = 0, self._bounds[-1]

        # The cache must not refer to `self`, because a cycle of references would keep the files
        # open after the last use of the stream.
        @functools.lru_cache(maxsize=_shards_open_at_once(len(shards)))
        def arrays(index: int) -> _Arrays:
            shard = shards[index]

            def mapped(suffix: str, dtype: np.dtype[Any]) -> NDArray[Any]:
                # Slicing is faster for a plain array than for an np.memmap.
                return np.asarray(np.memmap(folder / f"{shard.name}.{suffix}", dtype, mode="r"))

            return _Arrays(
                mapped(TOKENS, dtype),
                mapped(OFFSETS, OFFSET_DTYPE),
                mapped(LOSS_MASK, LOSS_MASK_DTYPE) if LOSS_MASK in shard.files else None,
            )

        self._arrays = arrays

    def view(self, start: int, stop: int, documents: int) -> "TokenStream":
        """Returns tokens [start, stop) as a stream; they must be `documents` complete documents."""
        assert 0 <= start <= stop <= self.tokens, f"[{start}, {stop}) not in [0, {self.tokens})"
        part = object.__new__(TokenStream)
        part.__dict__.update(self.__dict__)
        part._first, part.tokens, part.documents = self._first + start, stop - start, documents
        return part

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Returns tokens [start, stop); copies them only if they span several shards."""
        parts = [
            self._arrays(shard).tokens[low - base : high - base]
            for shard, base, low, high in self._overlaps(start, stop)
        ]
        return _joined(parts, self._dtype)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the positions in [start, stop) at which documents start, in ascending order."""
        found = []
        for shard, base, low, high in self._overlaps(start, stop):
            offsets = self._arrays(shard).offsets
            first, last = np.searchsorted(offsets, np.array([low - base, high - base], np.uint64))
            starts = offsets[first:last].astype(np.int64) + base
            # If data.verify=false, no earlier step has checked the offsets.
            if len(starts) and not (
                low <= starts[0] and starts[-1] < high and (starts[1:] > starts[:-1]).all()
            ):
                raise UserError(
                    f"{self._folder / self._shards[shard].name}.offsets does not ascend; the "
                    "folder is damaged: delete it and prepare it again."
                )
            found.append(starts - self._first)
        return _joined(found, np.dtype(np.int64))

    def loss_mask(self, start: int, stop: int) -> NDArray[np.uint8] | None:
        """Returns 1 for each token in [start, stop) that may be a target, and 0 for other tokens.

        Returns None if the stream has no mask; then every token may be a target.
        """
        if not self.has_loss_mask:
            return None
        parts = []
        for shard, base, low, high in self._overlaps(start, stop):
            mask = self._arrays(shard).loss_mask
            parts.append(
                np.ones(high - low, np.uint8) if mask is None else mask[low - base : high - base]
            )
        return _joined(parts, LOSS_MASK_DTYPE)

    def _overlaps(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Returns (shard, its first position, low, high) for each shard that overlaps the range.

        The returned positions count from the start of the split, even if this stream is a view.
        [low, high) is the part of the range that the shard contains.
        """
        assert 0 <= start <= stop <= self.tokens, f"[{start}, {stop}) not in [0, {self.tokens})"
        start, stop = self._first + start, self._first + stop
        overlaps = []
        shard = bisect.bisect_right(self._bounds, start) - 1
        while start < stop:
            base, end = self._bounds[shard], min(stop, self._bounds[shard + 1])
            overlaps.append((shard, base, start, end))
            start, shard = end, shard + 1
        return overlaps


def _joined(parts: list[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _shards_open_at_once(shards: int) -> int:
    """Returns how many shards may stay mapped; raises the limit of open files if necessary.

    Every mapped file stays open. A trillion tokens are about 16,000 shards, but the usual soft
    limit of open files is 1,024.
    """
    wanted = shards * _FILES_PER_SHARD + _FILES_LEFT_FREE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft == resource.RLIM_INFINITY:
        return max(1, shards)
    return max(1, min(shards, (soft - _FILES_LEFT_FREE) // _FILES_PER_SHARD))
