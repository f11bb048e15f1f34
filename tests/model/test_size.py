import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.size import flops_per_token, parameter_count
from mobilellm_jax.model.transformer import Transformer, param_shapes
from mobilellm_jax.paper.architectures import TABLE_ROWS

# Table 9 of the paper: layers, heads, key heads, width, feed-forward width, parameters.
SIZES = {
    "125m": (30, 9, 3, 576, 1536, 124_635_456),
    "350m": (32, 15, 5, 960, 2560, 345_355_200),
    "600m": (40, 18, 6, 1152, 3072, 603_188_352),
    "1b": (54, 20, 5, 1280, 3584, 1_005_461_760),
    "1.5b": (54, 25, 5, 1600, 4352, 1_511_188_800),
}


def initialised_total(config: ModelConfig) -> int:
    """Counts the parameters that initialisation would make, without allocating them."""
    tree = param_shapes(config)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("size", SIZES)
def test_final_models_have_the_papers_exact_totals(size: str) -> None:
    blocks, heads, kv_heads, width, ffn, total = SIZES[size]
    config = ModelConfig(
        num_blocks=blocks, num_heads=heads, num_kv_heads=kv_heads, embed_dim=width, ffn_dim=ffn
    )
    assert initialised_total(config) == total
    assert initialised_total(dataclasses.replace(config, num_repeats=2)) == total
    assert parameter_count(config) == total


def test_every_row_of_the_papers_tables_has_its_printed_total() -> None:
    assert len(TABLE_ROWS) == 80
    for row in TABLE_ROWS:
        tolerance = 0.5 if row.tables == ("1",) else 0.11  # Table 1 prints whole millions
        total = parameter_count(row.model) / 1e6
        assert total == pytest.approx(row.params_millions, abs=tolerance), row


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_repeats", [1, 2])
def test_formula_equals_the_tree(activation: str, tied: bool, num_repeats: int) -> None:
    config = ModelConfig(
        vocab_size=50,
        embed_dim=20,
        num_blocks=3,
        num_repeats=num_repeats,
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        ffn_dim=30,
        activation=activation,
        tie_embeddings=tied,
    )
    assert parameter_count(config) == initialised_total(config)


def test_flops_are_those_of_the_compiled_products() -> None:
    """The formula agrees with XLA's count for a program without loops and recomputation."""
    config = ModelConfig(
        vocab_size=512,
        embed_dim=128,
        num_blocks=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        ffn_dim=384,
        scan_unroll=2,
        compute_dtype="float32",
    )

    def loss(params: object, tokens: jax.Array) -> jax.Array:
        return jnp.sum(Transformer(config).apply({"params": params}, tokens) ** 2)

    params = param_shapes(config)
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    cost = jax.jit(jax.grad(loss)).lower(params, tokens).compile().cost_analysis()
    # The compiled attention computes the masked half of the scores too.
    masked_half = 6 * 2 * 4 * 32 * 64
    expected = (flops_per_token(config, 64) + masked_half) * 4 * 64
    # XLA also counts norms, softmax and activations, which are a few percent at this width.
    assert cost["flops"] == pytest.approx(expected, rel=0.08)


def test_shared_blocks_cost_flops_but_no_parameters() -> None:
    once = ModelConfig()
    twice = dataclasses.replace(once, num_repeats=2)
    assert parameter_count(once) == parameter_count(twice)
    head = 6 * once.vocab_size * once.embed_dim
    assert flops_per_token(twice, 2048) - head == 2 * (flops_per_token(once, 2048) - head)
    # By hand, the 125M model needs 0.960 GFLOP per token at length 2048.
    assert flops_per_token(once, 2048) / 1e9 == pytest.approx(0.960, abs=0.001)
