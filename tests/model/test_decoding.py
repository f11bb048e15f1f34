"""Decoding token by token equals the forward pass over whole sequences."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.cache import align, init_cache
from mobilellm_jax.model.decoding import DecodingWeights, decode, decoding_weights
from mobilellm_jax.model.transformer import Params, Transformer, init_params

TINY = ModelConfig(
    vocab_size=50,
    embed_dim=24,
    num_blocks=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=40,
    max_seq_len=32,
    init_std=0.3,  # large, so that every position changes the logits
    compute_dtype="float32",
)
# Both sides are float32 and sum at most 128 products per logit in another order.
FLOAT32 = 2e-5
# bfloat16 has 8 bits, and the sides round at different places. Hundreds of errors add up.
BFLOAT16 = 0.03
PROMPTS = (1, 7, 4)  # the length of each row's prompt


@functools.partial(jax.jit, static_argnames="config")
def decoded(
    config: ModelConfig, params: Params, weights: DecodingWeights, tokens_BT: jax.Array
) -> jax.Array:
    """Returns the logits after every token that follows the prompts, read one by one."""
    lengths_B = jnp.array(PROMPTS)
    width = max(PROMPTS)
    rest = tokens_BT.shape[1] - width
    cache = init_cache(config, len(PROMPTS), tokens_BT.shape[1], config.compute_dtype)
    model = Transformer(config).bind({"params": params})
    _, cache = model.extend(tokens_BT[:, :width], cache)
    aligned = align(dataclasses.replace(cache, length_B=lengths_B))
    following_TB = jax.vmap(lambda row_T, n: jnp.roll(row_T, -n))(tokens_BT, lengths_B).T[:rest]

    def step(aligned, token_B):
        logits_BV, aligned = decode(config, weights, token_B, aligned)
        return aligned, logits_BV

    _, logits_TBV = jax.lax.scan(step, aligned, following_TB)
    return logits_TBV.swapaxes(0, 1)


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({"sharing": "immediate", "num_repeats": 2, "tie_embeddings": False}, FLOAT32),
        ({"sharing": "repeat_all", "num_repeats": 2, "activation": "relu"}, FLOAT32),
        ({"sharing": "reverse", "num_repeats": 3, "activation": "gelu"}, FLOAT32),
        ({"num_kv_heads": 6, "num_blocks": 1}, FLOAT32),
        ({"num_kv_heads": 1, "num_blocks": 1, "activation": "relu"}, FLOAT32),
        ({"init_std": 0.1, "compute_dtype": "bfloat16"}, BFLOAT16),
    ],
    ids=lambda value: ", ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_decoding_equals_full_forward_at_every_position(
    fields: dict[str, Any], tolerance: float
) -> None:
    config = dataclasses.replace(TINY, **fields)
    params = init_params(config, jax.random.key(0))
    # The norm scales differ, so a test fails if one norm uses the scale of another.
    flat, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(flat))
    leaves = [
        leaf * jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
        for key, leaf in zip(keys, flat, strict=True)
    ]
    params = jax.tree.unflatten(tree, leaves)
    shape = (len(PROMPTS), 24)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    full_BTV = np.asarray(jax.jit(Transformer(config).apply)({"params": params}, tokens_BT))
    rest = shape[1] - max(PROMPTS)
    expected = np.stack([full_BTV[b, n : n + rest] for b, n in enumerate(PROMPTS)])
    actual = np.asarray(decoded(config, params, decoding_weights(params, config), tokens_BT))
    assert actual.dtype == np.float32
    assert np.abs(np.diff(expected, axis=1)).max(axis=-1).min() > 0.1, "positions must differ"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_a_shared_block_is_stored_once() -> None:
    config = dataclasses.replace(TINY, num_repeats=3)
    params = init_params(config, jax.random.key(0))
    weights = decoding_weights(params, config)
    table_VD = params["embedding"]["table"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    # The head is a transposed copy of the table.
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == count + table_VD.size
    assert weights.table_VD.unsafe_buffer_pointer() == table_VD.unsafe_buffer_pointer()
