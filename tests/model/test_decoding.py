import dataclasses
import functools

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
    init_std=0.3,  # so large that every position matters
    compute_dtype="float32",
)
SHARINGS = [(s, r) for s in ("immediate", "repeat_all", "reverse") for r in (2, 3)]
# Both sides are float32 and sum at most 128 products per logit in another order.
FLOAT32 = 2e-5
# 8 bits, rounded at other places: about a percent where hundreds of them add up.
BFLOAT16 = 0.03
PROMPTS = (1, 7, 4)  # tokens of the prompt of each row


@functools.partial(jax.jit, static_argnames="config")
def decoded(
    config: ModelConfig, params: Params, weights: DecodingWeights, tokens_BT: jax.Array
) -> jax.Array:
    """Logits after every token that follows the prompts: prompts at once, the rest one by one."""
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


def check(config: ModelConfig, tolerance: float) -> None:
    params = init_params(config, jax.random.key(0))
    # Scales that differ, or one norm's could stand for another's.
    flat, tree = jax.tree.flatten_with_path(params)
    keys = jax.random.split(jax.random.key(1), len(flat))
    leaves = [
        leaf * jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
        for key, (_, leaf) in zip(keys, flat, strict=True)
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


@pytest.mark.parametrize(("sharing", "repeats"), SHARINGS)
def test_decoding_equals_full_forward_at_every_position(sharing: str, repeats: int) -> None:
    check(dataclasses.replace(TINY, sharing=sharing, num_repeats=repeats), FLOAT32)


@pytest.mark.parametrize("activation", ["swiglu", "relu", "gelu"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_model_decodes(activation: str, tied: bool) -> None:
    config = dataclasses.replace(TINY, activation=activation, tie_embeddings=tied)
    check(config, FLOAT32)
    check(dataclasses.replace(config, num_kv_heads=6, num_blocks=1), FLOAT32)


def test_decoding_in_bfloat16() -> None:
    check(dataclasses.replace(TINY, init_std=0.1, compute_dtype="bfloat16"), BFLOAT16)


def test_weights_of_a_shared_block_are_there_once() -> None:
    config = dataclasses.replace(TINY, num_repeats=3)
    params = init_params(config, jax.random.key(0))
    weights = decoding_weights(params, config)
    table = params["embedding"]["table"].size
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == count + table  # the head's copy
    assert weights.table_VD is params["embedding"]["table"]
