"""Windows of token streams as the rows of a batch.

Window w of a stream contains its tokens [w * seq_len, w * seq_len + seq_len + 1). The first seq_len
tokens are inputs, and the last seq_len tokens are targets. Two successive windows share one token,
and the last window is padded with tokens of weight 0. Every token except the stream's first is
therefore a target exactly once per epoch. Under `document_mask`, the first token of each document
is not a target. A loss mask can exclude more targets.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import Boundaries
from mobilellm_jax.data.token_stream import TokenStream

Batch = dict[str, NDArray[Any]]

NO_WINDOW = -1
# `count_targets` reads the mask in steps of this many tokens.
_CHUNK = 1 << 24


def count_windows(stream: TokenStream, seq_len: int) -> int:
    """Returns the number of windows in `stream`, including the padded last window."""
    return -(-(stream.tokens - 1) // seq_len)


def count_targets(stream: TokenStream, boundaries: Boundaries) -> int:
    """Returns the sum of all weights in an epoch; reads the whole loss mask if there is one."""
    return sum(_targets_by_chunk(stream, boundaries))


def has_targets(stream: TokenStream, boundaries: Boundaries) -> bool:
    """Returns whether any weight is not 0; stops reading the loss mask after such a weight."""
    return any(_targets_by_chunk(stream, boundaries))


def _targets_by_chunk(stream: TokenStream, boundaries: Boundaries) -> Iterator[int]:
    documents = boundaries == "document_mask"
    if not stream.has_loss_mask:
        yield stream.tokens - (stream.documents if documents else 1)
        return
    for start in range(0, stream.tokens, _CHUNK):
        stop = min(start + _CHUNK, stream.tokens)
        counts = _may_be_target(stream, start, stop)
        if documents:
            counts[stream.document_starts(start, stop) - start] = False
        elif start == 0:
            counts[0] = False
        yield int(np.count_nonzero(counts))


def read_windows(
    streams: Sequence[TokenStream],
    stream_B: NDArray[np.int64],
    window_B: NDArray[np.int64],
    seq_len: int,
    boundaries: Boundaries,
) -> Batch:
    """Returns a batch; row b is window `window_B[b]` of stream number `stream_B[b]`.

    A row whose window is NO_WINDOW contains only padding. All arrays have shape [B, T]. "tokens"
    and "targets" are int32. "weights" are float32, and 0 where there is no target. Under
    `document_mask`, the batch also has "segments" and "positions", both int32. Segments number the
    documents of each window from 1, and padding has segment 0. Positions count from 0 in each
    document.
    """
    shape = (len(window_B), seq_len)
    tokens_BT, targets_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights_BT = np.zeros(shape, np.float32)
    inputs_B = np.zeros(len(window_B), np.int64)
    starts = []
    for row, (stream_number, window) in enumerate(
        zip(stream_B.tolist(), window_B.tolist(), strict=True)
    ):
        if window == NO_WINDOW:
            continue
        stream = streams[stream_number]
        start = window * seq_len
        stop = min(start + seq_len + 1, stream.tokens)
        read = stream.read(start, stop)
        inputs, targets = min(len(read), seq_len), len(read) - 1
        tokens_BT[row, :inputs] = read[:seq_len]
        targets_BT[row, :targets] = read[1:]
        weights_BT[row, :targets] = (
            _may_be_target(stream, start + 1, stop) if stream.has_loss_mask else 1
        )
        inputs_B[row] = inputs
        if boundaries == "document_mask":
            in_window = stream.document_starts(start, stop) - start
            starts.append(in_window + row * (seq_len + 1))
    batch: Batch = {"tokens": tokens_BT, "targets": targets_BT, "weights": weights_BT}
    if boundaries == "document_mask":
        start_S = np.concatenate(starts) if starts else np.empty(0, np.int64)
        row_S, at_S = np.divmod(start_S, seq_len + 1)
        weights_BT[row_S[at_S > 0], at_S[at_S > 0] - 1] = 0  # Targets that begin a document.
        batch["segments"], batch["positions"] = _number_documents(row_S, at_S, inputs_B, seq_len)
    return batch


def _may_be_target(stream: TokenStream, start: int, stop: int) -> NDArray[np.bool_]:
    mask = stream.loss_mask(start, stop)
    assert mask is not None, "the caller asks streams that have a mask"
    # An unverified file may contain values other than 0 and 1. The conversion makes them True.
    return mask.astype(np.bool_)


def _number_documents(
    row_S: NDArray[np.int64], at_S: NDArray[np.int64], inputs_B: NDArray[np.int64], seq_len: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Returns segments and positions; document s starts at position `at_S[s]` of row `row_S[s]`.

    In each row, segments number the documents from 1, and positions count from 0 in each document.
    If the first document of a row starts before the window, its positions count from the start of
    the window. The padding of row b starts at position `inputs_B[b]` and has segment 0.
    """
    rows = np.arange(len(inputs_B))
    inside_S = (at_S > 0) & (at_S < inputs_B[row_S])
    padded_B = inputs_B < seq_len
    # The positions in the flattened batch at which a new segment starts, in ascending order.
    begins = np.concatenate(
        [
            rows * seq_len,
            row_S[inside_S] * seq_len + at_S[inside_S],
            rows[padded_B] * seq_len + inputs_B[padded_B],
        ]
    )
    begins = np.unique(begins)
    lengths = np.diff(begins, append=len(rows) * seq_len)
    row_R, at_R = np.divmod(begins, seq_len)
    first_B = np.searchsorted(begins, rows * seq_len)
    number_R = np.arange(1, len(begins) + 1) - first_B[row_R]
    number_R[at_R >= inputs_B[row_R]] = 0
    segments_BT = np.repeat(number_R.astype(np.int32), lengths).reshape(-1, seq_len)
    # These positions count from the start of a row, so they fit int32 for any batch size.
    begin_BT = np.repeat(at_R.astype(np.int32), lengths).reshape(-1, seq_len)
    positions_BT = np.subtract(np.arange(seq_len, dtype=np.int32), begin_BT, out=begin_BT)
    return segments_BT, positions_BT
