"""No token reaches another document in its window: loader, segments, attention, logits.

The tests cover every implementation of attention that claims `documents`. Without the device of an
implementation, the tests run the kernel interpreted, or they give the kernel's arguments to the
reference function of the kernel's library.
"""

import functools
import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.config import DataConfig, ModelConfig
from mobilellm_jax.config.rules import ATTENTION
from mobilellm_jax.data.loader import train_batches
from mobilellm_jax.model import attention_kernels
from mobilellm_jax.model.transformer import Transformer, init_params

SEQ_LEN = 128  # the shortest window that every kernel takes
VOCABULARY = 64
APART = [name for name, rules in ATTENTION.items() if rules.documents]


def tokamax_reference(*arrays: Any) -> jax.Array:
    with jax.numpy_rank_promotion("allow"):  # Tokamax relies on rank promotion
        return attention_kernels.tokamax(*arrays, implementation="xla")


ELSEWHERE = {
    "splash": functools.partial(attention_kernels.splash, interpret=True),
    "tokamax": tokamax_reference,
}


def logits_of(attention: str, batch: dict[str, np.ndarray], segments: bool = True) -> np.ndarray:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        embed_dim=16,
        num_blocks=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        ffn_dim=24,
        max_seq_len=SEQ_LEN,
        init_std=0.5,
        attention=attention,  # type: ignore[arg-type]
        compute_dtype="float32",
    )
    params = init_params(config, jax.random.key(1))

    @jax.jit
    def forward(batch: dict[str, jax.Array]) -> Any:
        return Transformer(config).apply(
            {"params": params},
            batch["tokens"],
            segments_BT=batch["segments"] if segments else None,
            positions_BT=batch["positions"],
        )

    return np.asarray(forward({k: jnp.asarray(v) for k, v in batch.items()}))


@pytest.fixture
def window(write_tokens: Any) -> dict[str, np.ndarray]:
    """Returns rows of five documents, one of which has a single token.

    The first document began before the row. The last document continues after the row.
    """
    rng = np.random.default_rng(0)
    lengths = (60, 150, 2, 30, 1, 17, 2, 80, 40)
    docs = [rng.integers(3, VOCABULARY, n).tolist() for n in lengths]
    dataset = write_tokens(train=docs, vocab_size=VOCABULARY)
    data = DataConfig(seq_len=SEQ_LEN, boundaries="document_mask")
    (batch,) = train_batches(dataset, data, global_batch=3, first_sample=0, num_batches=1)
    second = [token for document in docs for token in document][SEQ_LEN : 2 * SEQ_LEN]
    (row,) = np.flatnonzero((batch["tokens"] == second).all(axis=1))
    lengths_in_row = np.bincount(batch["segments"][row]).tolist()
    assert lengths_in_row == [0, 82, 2, 30, 1, 13]
    return {name: array[row : row + 1] for name, array in batch.items()}


@pytest.mark.parametrize("attention", APART)
def test_no_token_reaches_another_document(
    attention: str, window: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "tokamax" and importlib.util.find_spec("tokamax") is None:
        pytest.skip("tokamax is optional")
    monkeypatch.setattr(sys, "argv", sys.argv[:1])  # Tokamax parses it
    if attention in ELSEWHERE:
        monkeypatch.setitem(attention_kernels._KERNELS, attention, ELSEWHERE[attention])
    # Row n has another token at place n. The test compares the rows with equal rows of an equal
    # program, because the place of a row in a matrix product may decide the order of the row's
    # sums.
    same = {name: np.repeat(array, SEQ_LEN, axis=0) for name, array in window.items()}
    changed = {name: array.copy() for name, array in same.items()}
    every = np.arange(SEQ_LEN)
    changed["tokens"][every, every] = (changed["tokens"][every, every] - 2) % 61 + 3
    before_BTV, after_BTV = logits_of(attention, same), logits_of(attention, changed)
    moved_BT = (before_BTV != after_BTV).any(axis=2)
    segments_T = window["segments"][0]
    own_BT = segments_T[:, None] == segments_T[None, :]
    assert not moved_BT[~own_BT].any()
    # Within its document, a token reaches itself and all later tokens, and no earlier token.
    np.testing.assert_array_equal(moved_BT, own_BT & (every[:, None] <= every[None, :]))


def test_without_segments_it_would(window: dict[str, np.ndarray]) -> None:
    """The test above can fail: positions alone do not separate documents."""
    changed = {name: array.copy() for name, array in window.items()}
    changed["tokens"][0, 0] = 3 + (changed["tokens"][0, 0] - 2) % 61
    before, after = (logits_of("xla", batch, segments=False) for batch in (window, changed))
    assert (before != after).any(axis=2).all()
