"""Checks a program with room for a fixed number of tokens, for any runtime."""

from collections.abc import Sequence

import numpy as np
import pytest

from mobilellm_jax.export.artifact import Artifact
from mobilellm_jax.export.runtime import Runtime

TOLERANCE = 2e-4  # of the largest logit, as formats.EXACT has it: sums in another order


def read_and_append(runtime: Runtime, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits [T, V] twice: for all tokens at once, and for single tokens with the cache."""
    at_once_TV = runtime.read(tokens)
    steps = [runtime.read(tokens[:1])[0], *(runtime.append(token) for token in tokens[1:])]
    return at_once_TV, np.stack(steps)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    allowed = TOLERANCE * max(1.0, np.abs(expected).max())
    assert np.abs(found - expected).max() <= allowed


def assert_all_of_the_room_is_exact(
    artifact: Artifact, tokens: Sequence[int], logits_TV: np.ndarray
) -> None:
    """Checks that both ways of reading work up to the limit and refuse one token more."""
    runtime, room = artifact.load(), len(tokens)
    for found_TV in read_and_append(runtime, tokens):
        assert_close(found_TV, logits_TV)
    refused = rf"{room + 1} tokens must have .* at most max_seq_len={room}"
    with pytest.raises(ValueError, match=refused):
        runtime.append(1)
    with pytest.raises(ValueError, match=f"max_seq_len={room}"):
        runtime.read([*tokens, 1])


def assert_nothing_stays_of_the_sequence_before(
    artifact: Artifact,
    tokens: Sequence[Sequence[int]],
    logits_BTV: np.ndarray,
    *,
    lengths: Sequence[int],
    appended: int,
) -> None:
    """Reads a part of the second sequence, then more tokens with the cache, after the first
    sequence.
    """
    runtime = artifact.load()
    runtime.read(tokens[0])
    for length in lengths:
        assert_close(runtime.read(tokens[1][:length]), logits_BTV[1, :length])
    for t in range(lengths[-1], lengths[-1] + appended):
        assert_close(runtime.append(tokens[1][t]), logits_BTV[1, t])
