from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.transformer import Params, Transformer, init_boxed, init_params

TOKENS = np.random.default_rng(1).integers(0, 61, (2, 10)).astype(np.int32)


def apply(config: ModelConfig, params: Params, **arguments: Any) -> jax.Array:
    def forward(tokens: jax.Array) -> Any:
        return Transformer(config).apply({"params": params}, tokens, **arguments)

    return jax.jit(forward)(jnp.asarray(TOKENS))


def test_logits_see_the_past_and_never_the_future(
    tiny: Callable[..., ModelConfig], strong_params: Params
) -> None:
    config = tiny(num_repeats=2)
    params = strong_params
    forward = jax.jit(lambda t: Transformer(config).apply({"params": params}, t))
    before = forward(TOKENS)
    for t in range(10):
        changed = TOKENS.copy()
        changed[:, t] = (changed[:, t] + 1) % 61
        difference_T = jnp.abs(forward(changed) - before).max(axis=(0, 2))
        np.testing.assert_array_equal(difference_T[:t], 0)
        assert (difference_T[t:] > 1e-4).all()


def test_documents_in_one_window_do_not_see_each_other(
    tiny: Callable[..., ModelConfig], strong_params: Params
) -> None:
    config = tiny(sharing="reverse", num_repeats=2)
    params = strong_params
    segments = np.array([[1] * 4 + [2] * 6, [1] * 9 + [2]], np.int32)
    positions = np.array([[*range(4), *range(6)], [*range(9), 0]], np.int32)
    forward = jax.jit(
        lambda t: Transformer(config).apply(
            {"params": params},
            t,
            segments_BT=jnp.asarray(segments),
            positions_BT=jnp.asarray(positions),
        )
    )
    packed = forward(TOKENS)
    for row, start, stop in ((0, 0, 4), (0, 4, 10), (1, 0, 9), (1, 9, 10)):
        alone = jax.jit(lambda t: Transformer(config).apply({"params": params}, t))(
            TOKENS[row : row + 1, start:stop]
        )
        # A masked key has weight zero exactly. Only the length of the sums differs.
        np.testing.assert_allclose(packed[row, start:stop], alone[0], atol=2e-5)
        changed = TOKENS.copy()
        changed[row, start:stop] = (changed[row, start:stop] + 7) % 61
        others = segments[row] != segments[row, start]
        np.testing.assert_array_equal(forward(changed)[row][others], packed[row][others])


def test_tied_head_is_the_embedding_table(tiny: Callable[..., ModelConfig]) -> None:
    tied, untied = tiny(), tiny(tie_embeddings=False)
    params = init_params(tied, jax.random.key(0))
    assert "head" not in params
    with_head = {**params, "head": {"kernel": params["embedding"]["table"].T}}
    np.testing.assert_allclose(apply(tied, params), apply(untied, with_head), atol=1e-6)
    assert init_params(untied, jax.random.key(0))["head"]["kernel"].shape == (24, 61)


@pytest.mark.parametrize("std", [0.02, 0.06])
def test_initial_weights_are_normal(tiny: Callable[..., ModelConfig], std: float) -> None:
    assert ModelConfig().init_std == 0.02  # as in the paper
    config = tiny(vocab_size=4000, embed_dim=64, ffn_dim=256, num_blocks=4, init_std=std)
    params = init_params(config, jax.random.key(0))
    flat = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in flat:
        assert leaf.dtype == jnp.float32
        if path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, 1)
        else:
            # The relative standard error is 1 / sqrt(2 * size), which is at most 1.3% here.
            assert float(jnp.std(leaf)) == pytest.approx(std, rel=0.05)
    query = params["blocks"]["attention"]["query"]
    assert float(jnp.abs(query[0] - query[1]).max()) > std / 2  # blocks are drawn independently


def test_every_parameter_has_logical_axes(tiny: Callable[..., ModelConfig]) -> None:
    boxed = jax.eval_shape(
        lambda key: init_boxed(tiny(tie_embeddings=False), key), jax.random.key(0)
    )
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert len(leaves) == 12
    for leaf in leaves:
        assert len(leaf.names) == leaf.value.ndim
        assert None not in leaf.names
    blocks = jax.tree.leaves(
        boxed["blocks"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    assert {leaf.names[0] for leaf in blocks} == {"blocks"}


def test_bfloat16_compute_keeps_float32_parameters_and_logits(
    tiny: Callable[..., ModelConfig], strong_params: Params
) -> None:
    wide, narrow = tiny(), tiny(compute_dtype="bfloat16")
    params = strong_params
    assert apply(narrow, params, method="hidden").dtype == jnp.bfloat16
    expected, found = apply(wide, params), apply(narrow, params)
    assert found.dtype == jnp.float32
    assert not np.array_equal(expected, found)
    # bfloat16 has 8 bits, so three blocks have an error of a few percent.
    assert float(jnp.abs(found - expected).max()) < 0.05 * float(jnp.abs(expected).max())


def test_gradients_of_a_frequent_token_are_summed_in_float32(
    tiny: Callable[..., ModelConfig], strong_params: Params
) -> None:
    config = tiny(compute_dtype="bfloat16")
    tokens = jnp.full((3, 1000), 7, jnp.int32)

    def total(table: jax.Array) -> jax.Array:
        params = {**strong_params, "embedding": {"table": table}}
        rows = Transformer(config).apply({"params": params}, tokens, method="_embed")
        assert rows.dtype == jnp.bfloat16
        return jnp.sum(rows.astype(jnp.float32))

    gradient = jax.jit(jax.grad(total))(strong_params["embedding"]["table"])
    # A bfloat16 sum would stop at 256, because 256 + 1 rounds to 256.
    np.testing.assert_array_equal(gradient[7], 3000)
    np.testing.assert_array_equal(jnp.delete(gradient, 7, axis=0), 0)
