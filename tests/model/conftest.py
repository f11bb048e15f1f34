import dataclasses
from collections.abc import Callable
from typing import Any

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
    """A small float32 config with the given fields replaced."""
    return lambda **fields: dataclasses.replace(TINY, **fields)


@pytest.fixture
def strong_params() -> Callable[..., Params]:
    """Parameters large enough that every part of the model matters to the logits."""

    def make(config: ModelConfig, seed: int = 0) -> Any:
        return jax.tree.map(
            lambda x: x * 8 if x.ndim > 2 else x, init_params(config, jax.random.key(seed))
        )

    return make
