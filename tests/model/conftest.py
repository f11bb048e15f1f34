import dataclasses
import functools
from collections.abc import Callable

import jax
import pytest

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.transformer import Params, init_params

TINY = ModelConfig(
    vocab_size=61,
    embed_dim=24,
    num_blocks=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=6,
    ffn_dim=40,
    max_seq_len=32,
    compute_dtype="float32",
)


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """Returns a function that makes a small float32 config with the given fields."""
    return lambda **fields: dataclasses.replace(TINY, **fields)


@functools.cache
def _strong_params() -> Params:
    params: Params = init_params(TINY, jax.random.key(0))
    return jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params)


@pytest.fixture
def strong_params() -> Params:
    """Large parameters of the tiny config, so that every part of it changes the logits.

    Repeats and their order change no shape, so these parameters fit every way of sharing.
    """
    return _strong_params()
