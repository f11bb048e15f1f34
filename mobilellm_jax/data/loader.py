"""Reads batches from token folders with Grain.

A training sample depends only on `data.seed` and the global sample index. From this index,
`mixture.py` computes a component of the mixture and the number i of the sample within the
component. In a component with W windows, sample i is window `permuted(i mod W)` of epoch i // W. A
training run can therefore continue at any sample index, on any number of hosts, with the same order
of samples.
"""

import functools
from collections.abc import Iterator

import grain
import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data.mixture import Component, Mixture, mixture_of
from mobilellm_jax.data.permutation import permuted
from mobilellm_jax.data.shards import Dataset
from mobilellm_jax.data.sources.source import TRAIN, VALIDATION
from mobilellm_jax.data.token_stream import TokenStream
from mobilellm_jax.data.windows import NO_WINDOW, Batch, count_windows, read_windows
from mobilellm_jax.errors import UserError

# With two threads, one thread copies while the other waits for the disk. Four threads compete for
# the GIL, and together read half as much as two.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
# Number of samples whose windows are computed together. This takes hardly longer than the
# computation for one batch.
_PLACED_TOGETHER = 4096
# Grain needs a length. At a million batches per second, this length lasts 146,000 years.
_ENDLESS = 1 << 62


def train_batches(
    tokens: Dataset | Mixture,
    data: DataConfig,
    *,
    global_batch: int,
    first_sample: int,
    num_batches: int | None = None,
    rows: NDArray[np.int64] | slice | None = None,
) -> Iterator[Batch]:
    """Returns `num_batches` training batches from global sample `first_sample` on.

    Batch k contains `global_batch` samples from sample first_sample + k * global_batch on. If
    `num_batches` is None, the batches never end. `rows` selects the rows of the batch that this
    host reads. `read_windows` describes the arrays of a batch.

    Raises:
      UserError: if a component has no token to predict.
    """
    mixture = _mixture(tokens)
    streams = required_streams(mixture, TRAIN)
    windows_C = [count_windows(stream, data.seq_len) for stream in streams]
    row_B = np.arange(global_batch, dtype=np.int64)[slice(None) if rows is None else rows]

    together = max(1, _PLACED_TOGETHER // max(1, len(row_B)))

    # Grain's threads read batches ahead, so the cache keeps a few blocks of batches.
    @functools.lru_cache(maxsize=4)
    def places(block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the component and window of every row in a block of `together` batches."""
        index_N1 = np.arange(block * together, (block + 1) * together)[:, None]
        sample_S = (first_sample + index_N1 * global_batch + row_B).ravel()
        component_S, index_S = mixture.place(sample_S, data.seed)
        window_S = np.empty_like(index_S)
        for component in np.unique(component_S).tolist():
            of_S, windows = component_S == component, windows_C[component]
            epoch_S, within_S = np.divmod(index_S[of_S], windows)
            window_S[of_S] = permuted(within_S, windows, data.seed, epoch_S, component)
        return component_S.reshape(together, -1), window_S.reshape(together, -1)

    def batch(index: int) -> Batch:
        block, at = divmod(index, together)
        component_NB, window_NB = places(block)
        return read_windows(streams, component_NB[at], window_NB[at], data.seq_len, data.boundaries)

    length = _ENDLESS if num_batches is None else num_batches
    return iter(grain.MapDataset.range(length).map(batch).to_iter_dataset(_READ))


def validation_batches(
    tokens: Dataset | Mixture,
    data: DataConfig,
    *,
    batch: int,
    num_batches: int | None = None,
    rows: NDArray[np.int64] | slice | None = None,
) -> Iterator[Batch]:
    """Returns each window of the validation split once, in at most `num_batches` batches.

    The batches leave out components without a validation split. A batch contains windows of only
    one component. If too few windows remain for a batch, it is filled with rows of weight 0, so
    every batch has the same shape.

    Raises:
      UserError: if no component has validation tokens to predict.
    """
    streams = required_streams(_mixture(tokens), VALIDATION)
    row_B = np.arange(batch, dtype=np.int64)[slice(None) if rows is None else rows]
    windows_C = np.array([count_windows(stream, data.seq_len) for stream in streams])
    ends_C = np.cumsum(-(-windows_C // batch))

    def read(index: int) -> Batch:
        component = int(np.searchsorted(ends_C, index, side="right"))
        before = int(ends_C[component - 1]) if component else 0
        window_B = (index - before) * batch + row_B
        window_B = np.where(window_B < windows_C[component], window_B, NO_WINDOW)
        component_B = np.full_like(window_B, component)
        return read_windows(streams, component_B, window_B, data.seq_len, data.boundaries)

    batches = int(ends_C[-1])
    length = batches if num_batches is None else min(batches, num_batches)
    return iter(grain.MapDataset.range(length).map(read).to_iter_dataset(_READ))


def required_streams(mixture: Mixture, split: str) -> list[TokenStream]:
    """Returns the token stream of every component in the split `split`.

    For the validation split, the list leaves out components without validation documents.

    Raises:
      UserError: if a component has no training token to predict, or no component has a validation
        token to predict.
    """
    streams = []
    for component in mixture.components:
        stream = component.stream(split)
        if stream is not None:
            streams.append(stream)
        elif split == TRAIN:
            raise UserError(_nothing_to_predict(mixture, component, split))
    if not streams:
        raise UserError(_nothing_to_predict(mixture, mixture.components[0], split))
    return streams


def _nothing_to_predict(mixture: Mixture, component: Component, split: str) -> str:
    of = f" of {component.name}" if len(mixture.components) > 1 else ""
    remedy = (
        "prepare it again with a larger --validation_fraction"
        if split == VALIDATION
        else "prepare it again from sources with text"
    )
    return (
        f"data.path={mixture.path!r}: split {split!r}{of} has {component.counts(split).tokens} "
        f"tokens, but predicting one takes at least 2; {remedy}."
    )


def _mixture(tokens: Dataset | Mixture) -> Mixture:
    return tokens if isinstance(tokens, Mixture) else mixture_of(tokens)
