"""A seeded permutation of 0..n-1, which is computed for single indices without a table.

A Feistel network permutes the numbers of 2h bits. If the image of an index is n or larger, the
network is applied to the image again, until the image is less than n (cycle walking; Black and
Rogaway 2002, "Ciphers with arbitrary finite domains"). On average, this takes fewer than four
applications, because 2^(2h) < 4n. The round function is the finalizer of SplitMix64 (Steele et al.
2014). The permutation must never change, because a run that continues from a checkpoint depends on
the same order of samples.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


def permuted(
    index_W: NDArray[np.int64],
    n: int,
    seed: int,
    epoch: int | NDArray[np.int64],
    stream: int = 0,
) -> NDArray[np.int64]:
    """Returns the images of indices in [0, n) under the permutation of (seed, epoch, stream).

    `epoch` is one number, or one number per index. Different values of `stream` give independent
    permutations.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low_bits = np.uint64((1 << int(half)) - 1)
    epoch_W = np.broadcast_to(np.asarray(epoch).astype(np.uint64), index_W.shape)
    key_W = _mix(epoch_W ^ _mix(_uint64(seed)))
    if stream:
        key_W = _mix(key_W ^ _mix(_uint64(stream)))
    keys_RW = _mix(key_W + np.arange(_ROUNDS, dtype=np.uint64)[:, None])
    image_W = index_W.astype(np.uint64)
    outside_W = np.ones(image_W.shape, np.bool_)
    while outside_W.any():
        left, right = image_W[outside_W] >> half, image_W[outside_W] & low_bits
        for round_keys in keys_RW[:, outside_W]:
            left, right = right, left ^ (_mix(right ^ round_keys) & low_bits)
        image_W[outside_W] = (left << half) | right
        outside_W = image_W >= np.uint64(n)
    return image_W.astype(np.int64)


def _uint64(value: int) -> NDArray[np.uint64]:
    return np.array([value % (1 << 64)], np.uint64)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = value + np.uint64(0x9E3779B97F4A7C15)  # The operations wrap around on purpose.
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
