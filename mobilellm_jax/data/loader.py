"""Batches from token shards, through Grain.

Window w of a split covers tokens [w * seq_len, w * seq_len + seq_len + 1) of its stream: the first
seq_len are the inputs, the last seq_len the targets. Neighbouring windows share one token and the
last one is padded with weight 0, so every token but the stream's first is a target exactly once per
epoch (under `document_mask`, every token but each document's first).

Which window a training sample is, depends on (data.seed, global sample index) only: index i is
window `permuted(i mod W)` of epoch i // W, W being the windows per epoch. So a run goes on at any
index, on any number of hosts, with the same order.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data.permutation import permuted
from mobilellm_jax.data.shards import Dataset, TokenStream
from mobilellm_jax.data.sources import TRAIN, VALIDATION

Batch = dict[str, NDArray[Any]]

_NO_WINDOW = -1
# Batches are copies out of mapped memory: a few threads hide page faults, more contend for the GIL.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
# Grain wants a length; at a million batches a second this one lasts 146,000 years.
_ENDLESS = 1 << 62


def windows_per_epoch(dataset: Dataset, split: str, seq_len: int) -> int:
    """Returns the number of windows, the padded last one included.

    Raises:
      ValueError: if the split is missing or has no token to predict.
    """
    return -(-(_stream(dataset, split).tokens - 1) // seq_len)


def train_batches(
    dataset: Dataset,
    data: DataConfig,
    *,
    global_batch: int,
    first_sample: int,
    num_batches: int | None = None,
    rows: slice | None = None,
) -> Iterator[Batch]:
    """Returns training batches from global sample `first_sample` on, without end if None.

    Batch k holds samples first_sample + k * global_batch up to the next batch's first; `rows` picks
    those of its rows that this host feeds. Arrays end in _BT: "tokens" and "targets" int32,
    "weights" float32, and under `document_mask` "segments" (from 1; 0 is padding) and "positions"
    int32, both counted within the window.
    """
    windows = windows_per_epoch(dataset, TRAIN, data.seq_len)
    stream = dataset.splits[TRAIN]
    row_B = np.arange(global_batch, dtype=np.int64)[rows or slice(None)]

    def batch(index: int) -> Batch:
        sample_B = first_sample + index * global_batch + row_B
        epoch_B, within_B = np.divmod(sample_B, windows)
        window_B = np.empty_like(sample_B)
        for epoch in np.unique(epoch_B):
            of_epoch = epoch_B == epoch
            window_B[of_epoch] = permuted(within_B[of_epoch], windows, data.seed, int(epoch))
        return _read_windows(stream, data, window_B)

    length = _ENDLESS if num_batches is None else num_batches
    return iter(grain.MapDataset.range(length).map(batch).to_iter_dataset(_READ))


def validation_batches(
    dataset: Dataset,
    data: DataConfig,
    *,
    batch: int,
    num_batches: int | None = None,
    rows: slice | None = None,
) -> Iterator[Batch]:
    """Returns the validation split's windows in order, each once; at most `num_batches` batches.

    Rows past the last window have weight 0 everywhere, so that every batch has the same shape. For
    the keys see `train_batches`.
    """
    windows = windows_per_epoch(dataset, VALIDATION, data.seq_len)
    stream = dataset.splits[VALIDATION]
    row_B = np.arange(batch, dtype=np.int64)[rows or slice(None)]
    batches = -(-windows // batch)

    def read(index: int) -> Batch:
        window_B = index * batch + row_B
        return _read_windows(stream, data, np.where(window_B < windows, window_B, _NO_WINDOW))

    length = batches if num_batches is None else min(batches, num_batches)
    return iter(grain.MapDataset.range(length).map(read).to_iter_dataset(_READ))


def _stream(dataset: Dataset, split: str) -> TokenStream:
    stream = dataset.splits.get(split)
    if stream is None or stream.tokens < 2:
        tokens = 0 if stream is None else stream.tokens
        remedy = (
            "prepare it again with a larger --validation_fraction"
            if split == VALIDATION
            else "prepare it again from sources with text"
        )
        raise ValueError(
            f"data.path={str(dataset.path)!r}: split {split!r} has {tokens} tokens, but predicting "
            f"one takes at least 2; {remedy}."
        )
    return stream


def _read_windows(stream: TokenStream, data: DataConfig, window_B: NDArray[np.int64]) -> Batch:
    """Returns the batch of these windows; a row of _NO_WINDOW is all padding."""
    shape = (len(window_B), data.seq_len)
    tokens_BT, targets_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights_BT = np.zeros(shape, np.float32)
    masked = data.boundaries == "document_mask"
    segments_BT, positions_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, window in enumerate(window_B.tolist()):
        start = window * data.seq_len
        stop = min(start + data.seq_len + 1, stream.tokens)
        read = stream.read(start, stop) if window != _NO_WINDOW else np.empty(0, np.int32)
        inputs = min(len(read), data.seq_len)
        tokens_BT[row, :inputs] = read[: data.seq_len]
        targets_BT[row, : max(0, len(read) - 1)] = read[1:]
        weights_BT[row, : max(0, len(read) - 1)] = 1
        if masked:
            starts = stream.document_starts(start, stop) - start if len(read) else read
            targets_that_start = starts[starts > 0] - 1
            weights_BT[row, targets_that_start] = 0
            _number_documents(starts, inputs, segments_BT[row], positions_BT[row])
    batch: Batch = {"tokens": tokens_BT, "targets": targets_BT, "weights": weights_BT}
    if masked:
        batch |= {"segments": segments_BT, "positions": positions_BT}
    return batch


def _number_documents(
    starts: NDArray[Any], inputs: int, segments_T: NDArray[np.int32], positions_T: NDArray[np.int32]
) -> None:
    """Fills one row: documents are numbered from 1, positions count from 0 in each.

    The first document may have begun before the window: its positions count from the window's
    start. Padding, from `inputs` on, is a document of its own with number 0.
    """
    seq_len = len(segments_T)
    borders = [0, *(int(s) for s in starts if 0 < s < inputs), inputs, seq_len]
    for number, (start, stop) in enumerate(itertools.pairwise(borders), 1):
        segments_T[start:stop] = number if start < inputs else 0
        positions_T[start:stop] = np.arange(stop - start)
